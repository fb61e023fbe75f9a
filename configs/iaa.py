"""Recipes of IAA (arXiv 2408.12902; official code 360CVGroup/Inner-Adaptor-Architecture).

`tiny_base` and `tiny` run on a laptop. The others are the published stages; the training code was
not published, and ASSUMPTION marks what neither the paper's tables nor the code state.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from data_pipelines.conversation import ConversationPipeline, ConversationRecord, Framing, Llama3
from data_pipelines.conversation.llava_json import LlavaJson
from data_pipelines.conversation.scenes import QUESTIONS, Kind, SceneDialogues, SceneTexts
from data_pipelines.conversation.templates import Plain, Template
from data_pipelines.conversation.tokenizer import BEGIN
from data_pipelines.protocols.answers import ChatReading
from data_pipelines.protocols.mme import Mme, MmeQuestions
from data_pipelines.protocols.questions import Questions
from data_pipelines.protocols.referring import PUBLISHED as REFERRING
from data_pipelines.protocols.referring import RefCoco, Referring
from data_pipelines.samplers.chat import ChatSampler
from data_pipelines.sampling import Tolerance
from data_pipelines.scenes.source import HELD_OUT
from data_pipelines.sources.base import Mixture, Source
from jaxmods.backbones.clip import VisionConfig
from jaxmods.backbones.llama import LlamaConfig
from jaxmods.nn.stack import Execution
from jaxmods.partitioning import MeshShape
from jaxmods.systems.iaa import IAA_8, Iaa
from jaxmods.systems.iaa.system import ADAPTOR
from train.experiment import (
    Checkpointing,
    Evaluation,
    Experiment,
    GroupOptim,
    Init,
    Logging,
    Optim,
    Precision,
)


def pipeline(
    system: Iaa,
    source: Source[ConversationRecord] | Mixture,
    *,
    tokenizer: str,
    template: Template,
    **options: Any,
) -> ConversationPipeline:
    """The pipeline whose batches are those of `system`."""
    return ConversationPipeline(
        source,
        tokenizer=tokenizer,
        template=template,
        **_pictures(system),
        max_tokens=system.max_tokens,
        pack=system.pack,
        **options,
    )


def reading(system: Iaa, *, tokenizer: str, template: Template, blind: bool = False) -> ChatReading:
    """How protocols ask the functions of `system`."""
    return ChatReading(
        tokenizer=tokenizer,
        template=template,
        **_pictures(system),
        prompt_tokens=system.prompt_tokens,
        blind=blind,
    )


def _pictures(system: Iaa) -> dict[str, Any]:
    """What pipelines and readings know of pictures; none for the base alone."""
    seen = system.branch != "Text"
    return {
        "framing": Framing(336 if system.vision is None else system.vision.image_size),
        "image_tokens": system.image_tokens if seen else 0,
        "max_images": system.max_images if seen else 0,
    }


# The laptop recipes -----------------------------------------------------------------------------

# With more objects a scene takes far longer to be told apart: three are learnt in minutes.
FEW = (1, 3)
ASKED: tuple[Kind, ...] = (*QUESTIONS, "ground")
SHORT = Llama3(system="")  # the published system message would be half of a tiny sequence
VOCABULARY = 768  # of the packaged tokenizer; its first six ids are the special tokens
END_OF_TEXT, END_OF_TURN = 1, 4

TINY_LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    width=96,
    layers=3,
    heads=3,
    kv_heads=3,
    head_dim=32,
    mlp=256,
    # To read is to look up. Turns this fast and weights this large together (Llama's own: 10,000,
    # 0.02) took fewer steps to answer what is told; what they do not find: the system's README.
    rope_theta=100.0,
    initializer_range=0.06,
    max_positions=512,
    bos_id=0,
    eos_ids=(END_OF_TURN,),
)
TINY_BASE = Iaa(
    llama=TINY_LLAMA,
    vision=None,
    insert_after=(),
    branches=(),
    branch="Text",
    trains=("base",),
    max_tokens=180,
    prompt_tokens=128,
    new_tokens=32,
    stop_ids=(END_OF_TURN,),
    pad_id=END_OF_TEXT,
)
# 64 tokens of 8 x 8 px. The tower starts as that of `fgclip/tiny_regions`; too small a one to be
# left as it is, it goes on training with the adaptor.
TINY = dataclasses.replace(
    TINY_BASE,
    vision=VisionConfig(width=96, layers=3, heads=3, mlp=384, image_size=64, patch_size=8),
    insert_after=(0, 1, 2),
    branches=("MM",),
    branch="MM",
    trains=(*ADAPTOR, "vision"),
    max_tokens=100,
    prompt_tokens=128,
    new_tokens=24,
)


TOLD = SceneDialogues(told=True, places=True, questions=4, objects=FEW)
COMPARED = dataclasses.replace(TOLD, kinds=("relation",), objects=(2, 3), given=True)


def tiny_compare() -> Experiment:
    """A language model that compares squares of a chessboard: the first exercise of `tiny_base`,
    by itself, because among the others, as one word in ten of an answer, it was not learnt."""
    unseen = dataclasses.replace(COMPARED, start=HELD_OUT, count=512, questions=1)
    read = reading(TINY_BASE, tokenizer="scene", template=SHORT)
    return Experiment(
        system=TINY_BASE,
        data=pipeline(
            TINY_BASE,
            COMPARED,
            tokenizer="scene",
            template=SHORT,
            tolerance=Tolerance(max_bad_fraction=0.5),  # some scenes have nothing to compare
        ),
        batch_size=16,
        steps=1200,
        optim=Optim(lr=2e-3, warmup_steps=100, b2=0.98, clip_norm=1.0, weight_decay=0.3),
        checkpoint=Checkpointing(every=1000, keep=1),
        evaluation=Evaluation(
            protocols=(Questions(unseen, read, function="sample_text", label="compared"),)
        ),
        logging=Logging(every=50),
        notes="Exported, it is where iaa/tiny_base starts.",
    )


def tiny_base() -> Experiment:
    """A language model of the scene world without eyes: captions, and questions about them."""
    unseen = dataclasses.replace(TOLD, start=HELD_OUT, count=768, questions=1)
    read = reading(TINY_BASE, tokenizer="scene", template=SHORT)
    first = tiny_compare()
    assert isinstance(first.data, ConversationPipeline)
    return dataclasses.replace(
        first,
        data=dataclasses.replace(
            first.data,
            source=Mixture(
                (
                    SceneTexts(),
                    TOLD,
                    dataclasses.replace(TOLD, kinds=("each",), questions=1),
                    COMPARED,
                    dataclasses.replace(TOLD, kinds=("exists",)),
                ),
                (0.5, 2.5, 2.0, 3.0, 1.0),
            ),
            tolerance=Tolerance(max_bad_fraction=0.2),
        ),
        steps=2400,
        evaluation=Evaluation(
            protocols=(Questions(unseen, read, function="sample_text", label="told"),)
        ),
        init=Init(weights="runs/iaa_tiny_compare_hf"),
        notes="Exported, it is half of the start of iaa/tiny; LlamaForCausalLM loads it.",
    )


def tiny() -> Experiment:
    """Adaptors in the frozen `tiny_base` learn to answer questions about scenes and to find things
    in them, in minutes on a laptop."""
    read = reading(TINY, tokenizer="scene", template=SHORT)
    grey = dataclasses.replace(read, blind=True)
    asked = SceneDialogues(places=True, questions=3, objects=FEW)
    compared = dataclasses.replace(asked, kinds=("relation",), objects=(2, 3))
    questions = dataclasses.replace(asked, start=HELD_OUT, count=768, questions=1)
    # Of the questions above a tenth: too few to tell a few per cent from guessing.
    pairs = dataclasses.replace(compared, start=HELD_OUT, count=512, questions=1)
    ground = SceneDialogues(start=HELD_OUT, count=256, kinds=("ground",), objects=FEW)
    return Experiment(
        system=TINY,
        data=pipeline(
            TINY,
            Mixture(
                (
                    dataclasses.replace(asked, kinds=("each",), questions=1),
                    dataclasses.replace(asked, kinds=("relation", "each"), questions=2),
                    dataclasses.replace(compared, questions=2, given=True),
                    asked,
                    dataclasses.replace(asked, kinds=("exists",), questions=4),
                    SceneDialogues(kinds=("ground",), questions=2, objects=FEW),
                ),
                (1.5, 2.0, 1.0, 1.5, 1.0, 1.5),
            ),
            tokenizer="scene",
            template=SHORT,
        ),
        batch_size=16,
        steps=4000,
        optim=Optim(
            lr=2e-3,
            warmup_steps=100,
            b2=0.98,
            clip_norm=1.0,
            # With 2e-3 for all, image tokens outgrew the words a thousandfold (their scale has no
            # gradient through a norm, only Adam's steps). The tower waits until the adaptor reads
            # what it says.
            groups=(
                GroupOptim("projector", lr=1e-3),
                GroupOptim("vision", lr=3e-4, start_step=1000),
            ),
        ),
        checkpoint=Checkpointing(every=1000, keep=1),
        evaluation=Evaluation(
            every=1000,
            protocols=(
                Questions(questions, read),
                Questions(questions, grey),
                Questions(pairs, read, label="relations"),
                Questions(pairs, grey, label="relations"),
                Referring(ground, read, function="sample_mm"),
                Referring(ground, grey, function="sample_mm"),
            ),
        ),
        sampler=ChatSampler(
            read,
            SceneDialogues(start=HELD_OUT, count=64, kinds=ASKED, objects=FEW),
            workflows=(("MM", "mm"), ("G", "mm"), ("Text", "text")),
            new_tokens=TINY.new_tokens,
        ),
        logging=Logging(every=50),
        init=Init(weights="runs/iaa_tiny_start"),
        notes="One branch learns both here; chance is the most frequent answer, or the best box. "
        "The start is made of tiny_base and fgclip/tiny_regions: jaxmods/systems/iaa/README.md.",
        shorthands=(("weights", ("init.weights",)),),
    )


# Published stages -------------------------------------------------------------------------------

# Evaluation splits: name -> file of referring expressions.
SPLITS = {
    name: f"REC_{name.replace('_', '_unc_' if name.startswith('refcoco_') else '_', 1)}.jsonl"
    for name in REFERRING
}

# One branch at a time is trained; the two are merged afterwards (`load_grounding`).
IAA14 = Iaa(branches=("MM",), execution=Execution(remat="full"))
IAA8 = dataclasses.replace(IAA14, insert_after=IAA_8)
INSTRUCT = "data/LLaVA-Instruct/llava_v1_5_mix665k.json"
WEIGHTS = "weights/iaa-start"  # Llama-3-8B-Instruct and the CLIP tower in one folder


def _stage(
    system: Iaa,
    source: Source[ConversationRecord],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    template: Template,
    weights: str,
    notes: str,
) -> Experiment:
    """The common part; AdamW without decay, cosine, warm-up of 3 % (LLaVA 1.5's recipe)."""
    return Experiment(
        system=system,
        data=pipeline(system, source, tokenizer=weights, template=template),
        batch_size=batch_size,
        steps=steps,
        optim=Optim(lr=lr, warmup_steps=round(0.03 * steps), clip_norm=1.0),
        mesh=MeshShape(data=1, fsdp=-1),
        precision=Precision(params="float32", frozen="bfloat16", compute="bfloat16"),
        checkpoint=Checkpointing(every=500, keep=2),
        logging=Logging(every=10),
        init=Init(weights=weights),
        notes=notes,
        shorthands=(
            ("weights", ("init.weights", "data.tokenizer")),
            ("pack", ("system.pack", "data.pack")),
            ("data.path", ("data.source.path",)),
            ("data.root", ("data.source.root",)),
        ),
    )


def _pretrain(system: Iaa, lr: float, notes: str) -> Experiment:
    return _stage(
        system,
        LlavaJson("data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"),
        steps=2180,  # one epoch of 558 K; ASSUMPTION: batch 256, 1 epoch (LLaVA 1.5)
        batch_size=256,
        lr=lr,
        template=Plain(bos=BEGIN, end="\n"),
        weights=WEIGHTS,
        notes=notes,
    )


def pretrain_projector() -> Experiment:
    """IAA-14, stage 1: the projector alone, on captions."""
    system = dataclasses.replace(IAA14, trains=("projector",), max_tokens=256)
    # ASSUMPTION: lr 1e-3, as LLaVA 1.5.
    return _pretrain(system, 1e-3, "Branches start as copies of the base (ASSUMPTION).")


def pretrain() -> Experiment:
    """IAA-14, stage 2: the whole adaptor, on captions."""
    system = dataclasses.replace(IAA14, max_tokens=256)
    # ASSUMPTION: the same pairs, lr 2e-5; whether the branch's norm trains is not stated.
    return _pretrain(system, 2e-5, "Starts from stage 1: --set weights=FOLDER.")


def _instruct(system: Iaa) -> Experiment:
    return _stage(
        system,
        LlavaJson(INSTRUCT),
        steps=5197,  # one epoch of 665 K; ASSUMPTION: batch 128, 1 epoch, lr 2e-5
        batch_size=128,
        lr=2e-5,
        template=Llama3(),
        weights="weights/iaa-pretrained",
        notes="The paper's 1.5 M adds about 0.3 M records that are not published.",
    )


def instruct() -> Experiment:
    """IAA-14, stage 3: instructions with pictures."""
    return _instruct(IAA14)


def instruct_8() -> Experiment:
    """IAA-8, stage 3; the positions of its layers are an ASSUMPTION."""
    return _instruct(IAA8)


def _grounding(system: Iaa) -> Experiment:
    return _stage(
        system,
        LlavaJson("data/grounding/rec_2m.json", task="G"),
        steps=15_625,  # one epoch of 2 M; ASSUMPTION: as stage 3
        batch_size=128,
        lr=2e-5,
        template=Llama3(),
        weights="weights/iaa-instructed",
        notes="ASSUMPTION: starts from stage 3; the 2 M referring expressions are not published.",
    )


def grounding() -> Experiment:
    """IAA-14, stage 4: boxes; its branch becomes G of the published model (`load_grounding`)."""
    return _grounding(IAA14)


def grounding_8() -> Experiment:
    """IAA-8, stage 4."""
    return _grounding(IAA8)


# The published checkpoint -----------------------------------------------------------------------


def iaa_14() -> Experiment:
    """The published IAA-14 with all three workflows: import, evaluate, talk to it, export."""
    weights = "weights/Inner-Adaptor-Architecture"
    system = Iaa(execution=Execution(remat="full"))
    read = reading(system, tokenizer=weights, template=Llama3())
    protocols = (
        Mme(
            MmeQuestions("data/MME/MME_Benchmark_release_version", "data/MME/llava_mme.jsonl"),
            read,
            model="iaa-14",
        ),
        *(
            Referring(RefCoco(f"data/rec/{file}", "data/coco/train2014"), read, label=name)
            for name, file in SPLITS.items()
        ),
    )
    tokenizers = tuple(f"evaluation.protocols.{n}.reading.tokenizer" for n in range(len(protocols)))
    stage = _instruct(system)
    places = ("init.weights", "data.tokenizer", "sampler.reading.tokenizer", *tokenizers)
    return dataclasses.replace(
        stage,
        data=pipeline(system, LlavaJson(INSTRUCT), tokenizer=weights, template=Llama3()),
        evaluation=Evaluation(batch_size=64, protocols=protocols),
        sampler=ChatSampler(read),
        init=Init(weights=weights),
        notes="File names of the RefCOCO+ and RefCOCOg splits are an ASSUMPTION. On several chips "
        "evaluate and sample with --set mesh.fsdp=1 mesh.tensor=-1 (up to 8, its key heads).",
        shorthands=(("weights", places), *stage.shorthands[1:]),
    )
