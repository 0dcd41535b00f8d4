"""What one record becomes: any known shape of it, the chat template, token ids and the mask of what is learnt."""

from hbp.data.record.encode import Encoded, Outcome, encode_records
from hbp.data.record.formats import Reading
from hbp.data.record.templates import described, load_tokenizer, template_fingerprint, training_version

__all__ = [
    "Encoded",
    "Outcome",
    "Reading",
    "described",
    "encode_records",
    "load_tokenizer",
    "template_fingerprint",
    "training_version",
]
