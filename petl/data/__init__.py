"""Data sets: `read_data(cfg.data)` reads and checks the rows before any model is loaded."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from petl.data.bucketing import BucketBatchSampler as BucketBatchSampler

# by `data.source`, "module:class", imported when it is chosen
SOURCES = {
    "wordnet": "petl.data.bundled:WordNet",
    "wordnet_retrieval": "petl.data.retrieval_sets:WordNetRetrieval",
    "newsgroups_retrieval": "petl.data.retrieval_sets:NewsgroupsRetrieval",
    "stamps_retrieval": "petl.data.stamps:StampsRetrieval",
    "documents": "petl.data.documents:Documents",
    "hamlet": "petl.data.bundled:Hamlet",
    "reasoning": "petl.data.bundled:Reasoning",
    "files": "petl.data.files:Files",
    "hub": "petl.data.hub:HubData",
    "image_folder": "petl.data.folders:ImageFolder",
    "audio_folder": "petl.data.folders:AudioFolder",
    "digits": "petl.data.bundled:Digits",
    "speech": "petl.data.folders:Speech",
    "stamps": "petl.data.stamps:Stamps",
    "tasks": "petl.data.task_sets:TaskSets",
    "mixture": "petl.data.set_mixture:SetMixture",
}


def __getattr__(name: str) -> object:
    """`petl.data.BucketBatchSampler`, imported on first use: it needs torch."""
    if name == "BucketBatchSampler":
        from petl.data.bucketing import BucketBatchSampler

        return BucketBatchSampler
    raise AttributeError(f"module 'petl.data' has no attribute {name!r}")
