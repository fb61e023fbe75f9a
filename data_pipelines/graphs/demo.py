"""A small generated knowledge graph whose relations obey known rules.

People live in districts of cities of countries, have parents and work for firms with an office in a
city. What follows from what is fixed, so a model that learns composition can answer test triples
that it has never seen, and chance cannot:

    lives_in_city     = lives_in . district_of                 (N-1, composition)
    lives_in_country  = lives_in_city . city_of                (N-1, composition)
    works_in_city     = works_for . office_in                  (N-1, composition)
    employs           = works_for reversed                     (1-N, inverse)
    parent            : older people                           (N-N, no rule)
    mayor             : one person per city                    (1-1, no rule)

Test and valid triples come only from derived relations (the first four above), whose premises stay
in train. Their questions and answers are of different kinds: between entities of one kind a
translation-like score tends to put the question's own entity first (see the README of StarGraph),
and a filtered rank counts that as a wrong answer.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from data_pipelines.graphs.triples import Graph, GraphSource

RELATIONS = (
    "lives_in",
    "district_of",
    "city_of",
    "works_for",
    "office_in",
    "parent",
    "mayor",
    "lives_in_city",
    "lives_in_country",
    "works_in_city",
    "employs",
)
DERIVED = ("lives_in_city", "lives_in_country", "works_in_city", "employs")


@dataclasses.dataclass(frozen=True)
class DemoGraph(GraphSource):
    """The graph of the module's docstring.

    Attributes:
      people, districts, cities, countries, firms: how many of each.
      held_out: share of derived triples in valid, and again in test.
      seed: of the generator.
    """

    people: int = 400
    districts: int = 48
    cities: int = 16
    countries: int = 5
    firms: int = 130
    held_out: float = 0.15
    seed: int = 0

    def read(self) -> Graph:
        rng = np.random.default_rng([self.seed, 20240229])
        names: list[str] = []

        def group(kind: str, size: int) -> np.ndarray:
            names.extend(f"{kind}_{i}" for i in range(size))
            return np.arange(len(names) - size, len(names))

        person, district = group("person", self.people), group("district", self.districts)
        city, country = group("city", self.cities), group("country", self.countries)
        firm = group("firm", self.firms)
        district_city = np.arange(self.districts) % self.cities
        city_country = np.arange(self.cities) % self.countries
        home = rng.integers(0, self.districts, self.people)
        firm_of = rng.integers(0, self.firms, self.people)
        office = rng.integers(0, self.cities, self.firms)
        # Parents are older (smaller id), near in the order, two for most people.
        older = np.arange(self.people)
        reach = np.minimum(older, 40)
        parents = [older - 1 - (rng.random(self.people) * reach).astype(int) for _ in range(2)]
        child_parent = {
            (int(c), int(p)) for ps in parents for c, p in zip(older, ps, strict=True) if 0 <= p < c
        }
        mayors = rng.permutation(self.people)[: self.cities]
        pairs = {
            "lives_in": zip(person, district[home], strict=True),
            "district_of": zip(district, city[district_city], strict=True),
            "city_of": zip(city, country[city_country], strict=True),
            "works_for": zip(person, firm[firm_of], strict=True),
            "office_in": zip(firm, city[office], strict=True),
            "parent": sorted(child_parent),
            "mayor": zip(city, person[mayors], strict=True),
            "lives_in_city": zip(person, city[district_city[home]], strict=True),
            "lives_in_country": zip(
                person, country[city_country[district_city[home]]], strict=True
            ),
            "works_in_city": zip(person, city[office[firm_of]], strict=True),
            "employs": zip(firm[firm_of], person, strict=True),
        }
        splits: dict[str, list[tuple[int, int, int]]] = {"train": [], "valid": [], "test": []}
        for number, relation in enumerate(RELATIONS):
            triples = [(int(h), number, int(t)) for h, t in pairs[relation]]
            kinds = np.zeros(len(triples), int)
            if relation in DERIVED:
                draw = rng.random(len(triples))
                kinds = (draw < self.held_out).astype(int) + (draw < 2 * self.held_out)
            for triple, kind in zip(triples, kinds.tolist(), strict=True):
                splits[("train", "valid", "test")[kind]].append(triple)
        arrays = {
            k: rng.permutation(np.asarray(v, np.int32).reshape(-1, 3)) for k, v in splits.items()
        }
        return Graph(
            "demo",
            len(names),
            len(RELATIONS),
            arrays["train"],
            arrays["valid"],
            arrays["test"],
            entity_names=tuple(names),
            relation_names=RELATIONS,
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]
