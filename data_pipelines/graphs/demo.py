"""A small generated knowledge graph whose relations obey known rules.

People live in districts of cities of countries, have parents, work for firms and know each other.
What follows from what is fixed, so a model that learns composition can answer test triples that it
has never seen, and chance cannot:

    lives_in_city     = lives_in . district_of                 (N-1, composition)
    lives_in_country  = lives_in_city . city_of                (N-1, composition)
    grandparent       = parent . parent                        (N-N, composition)
    child             = parent reversed                        (1-N, inverse)
    colleague         : works_for the same firm                (N-N, symmetric)
    mayor             : one person per city                    (1-1)

Test and valid triples come only from derived relations (the first five above), whose premises stay
in train.
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
    "parent",
    "mayor",
    "lives_in_city",
    "lives_in_country",
    "grandparent",
    "child",
    "colleague",
)
DERIVED = ("lives_in_city", "lives_in_country", "grandparent", "child", "colleague")


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
        # Parents are older (smaller id), near in the order, two for most people.
        older = np.arange(self.people)
        reach = np.minimum(older, 40)
        parents = [older - 1 - (rng.random(self.people) * reach).astype(int) for _ in range(2)]
        child_parent = {
            (int(c), int(p)) for ps in parents for c, p in zip(older, ps, strict=True) if 0 <= p < c
        }
        parents_of: dict[int, list[int]] = {}
        for c, p in sorted(child_parent):
            parents_of.setdefault(c, []).append(p)
        grand = sorted({(c, g) for c, p in child_parent for g in parents_of.get(p, [])})
        mates = [
            (i, j)
            for i in range(self.people)
            for j in range(self.people)
            if i != j and firm_of[i] == firm_of[j]
        ]
        mayors = rng.permutation(self.people)[: self.cities]
        pairs = {
            "lives_in": zip(person, district[home], strict=True),
            "district_of": zip(district, city[district_city], strict=True),
            "city_of": zip(city, country[city_country], strict=True),
            "works_for": zip(person, firm[firm_of], strict=True),
            "parent": sorted(child_parent),
            "mayor": zip(city, person[mayors], strict=True),
            "lives_in_city": zip(person, city[district_city[home]], strict=True),
            "lives_in_country": zip(
                person, country[city_country[district_city[home]]], strict=True
            ),
            "grandparent": grand,
            "child": sorted((p, c) for c, p in child_parent),
            "colleague": mates,
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
