"""Tasks: how rows are encoded, batched and scored, and which model head they need."""

# by `data.task`, "module:class", imported when it is chosen
TASKS = {
    "classification": "petl.data.tasks.classification:Classification",
    "regression": "petl.data.tasks.regression:Regression",
    "token_classification": "petl.data.tasks.token_classification:TokenClassification",
    "question_answering": "petl.data.tasks.question_answering:QuestionAnswering",
    "causal_lm": "petl.data.tasks.causal_lm:CausalLM",
    "seq2seq": "petl.data.tasks.seq2seq:Seq2Seq",
    "image_classification": "petl.data.tasks.media:ImageClassification",
    "audio_classification": "petl.data.tasks.media:AudioClassification",
    "multitask_classification": "petl.data.tasks.multitask:MultitaskClassification",
}
