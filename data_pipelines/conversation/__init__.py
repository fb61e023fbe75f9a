"""Conversations about pictures: records, templates, tokens, splicing, batches (LLaVA and kin)."""

from data_pipelines.conversation.pictures import Framing, frame_box, prepare, unframe_box
from data_pipelines.conversation.pipeline import ConversationPipeline
from data_pipelines.conversation.records import ConversationRecord, Turn
from data_pipelines.conversation.splice import IGNORE, IMAGE, Spliced, bucket, splice
from data_pipelines.conversation.templates import Encoded, Llama3, Plain, Template, Vicuna
from data_pipelines.conversation.tokenizer import ChatTokenizer, load_chat_tokenizer

__all__ = [
    "IGNORE",
    "IMAGE",
    "ChatTokenizer",
    "ConversationPipeline",
    "ConversationRecord",
    "Encoded",
    "Framing",
    "Llama3",
    "Plain",
    "Spliced",
    "Template",
    "Turn",
    "Vicuna",
    "bucket",
    "frame_box",
    "load_chat_tokenizer",
    "prepare",
    "splice",
    "unframe_box",
]
