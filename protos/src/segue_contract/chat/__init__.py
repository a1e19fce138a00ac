"""From a conversation to token ids and back. Needs `tokenizers` and `jinja2`: nodes only."""

from segue_contract.chat.detokenizer import Detokenizer
from segue_contract.chat.stops import Scan, StopScanner
from segue_contract.chat.template import ChatTemplate, Message, Piece
from segue_contract.chat.tokenizer import ChatTokenizer

__all__ = [
    "ChatTemplate",
    "ChatTokenizer",
    "Detokenizer",
    "Message",
    "Piece",
    "Scan",
    "StopScanner",
]
