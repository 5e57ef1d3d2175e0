"""What other trainers call a setting: TrainingArguments, TRL, LLaMA-Factory, axolotl."""

STEPS = "train.batch_size=N, the examples of a step, and train.micro_batch_size=N, those of a pass"
FILES = "data=files data.train=FILE, or data=hub data.name=NAME"
MODEL = "model=hub model.name=NAME, or model=path model.path=FOLDER"
# by name, what is written here
HERE = {
    **dict.fromkeys(("output_dir", "save_dir"), "train.run=FOLDER, or train.output of all runs"),
    **dict.fromkeys(("learning_rate", "lr"), "train.lr"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs"), "train.epochs"),
    **dict.fromkeys(("max_steps", "steps"), "train.steps"),
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "train_batch_size", "batch_size"),
            *("gradient_accumulation_steps", "micro_batch_size"),
        ),
        STEPS,
    ),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "train.eval_batch_size"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "train.warmup, a share below 1 or steps"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), "train.schedule"),
    **dict.fromkeys(("optim", "optimizer"), "train.optimizer"),
    **dict.fromkeys(("fp16", "bf16"), "train.precision=bf16, or auto"),
    **dict.fromkeys(("logging_steps", "log_steps"), "train.log_steps"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "eval_steps"), "train.eval_steps"),
    **dict.fromkeys(("save_strategy", "save_steps"), "train.save_steps"),
    "save_total_limit": "train.keep_checkpoints",
    "early_stopping_patience": "train.early_stopping",
    "load_best_model_at_end": "train.eval_steps=N, which keeps the best checkpoint",
    "metric_for_best_model": "train.eval_steps=N; the first metric of the task selects the best",
    "dataloader_num_workers": "train.num_workers",
    "group_by_length": "train.buckets=auto, the default",
    "report_to": "tracker=NAME",
    "run_name": "train.run=FOLDER",
    **dict.fromkeys(("resume_from_checkpoint", "resume"), "train.resume"),
    "gradient_checkpointing": "train.gradient_checkpointing",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "seed": "train.seed",
    **dict.fromkeys(("model_name", "model_name_or_path", "base_model", "model_id"), MODEL),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "train_file", "data_path"), FILES),
    **dict.fromkeys(("validation_file", "test_file"), "data.test=FILE"),
    **dict.fromkeys(
        ("max_seq_length", "max_length", "max_seq_len", "sequence_len", "cutoff_len"),
        "data.max_length",
    ),
    **dict.fromkeys(("finetuning_type", "adapter", "peft_type"), "+method=NAME"),
    **dict.fromkeys(("rank", "lora_rank", "lora_r", "r"), "method.r"),
    **dict.fromkeys(("lora_alpha", "alpha"), "method.lora_alpha"),
    **dict.fromkeys(("lora_dropout", "dropout"), "method.lora_dropout"),
    **dict.fromkeys(
        ("target_modules", "lora_target", "lora_target_modules"), "method.target_modules"
    ),
    **dict.fromkeys(("load_in_4bit", "quantization_bit"), "model.quantization=bnb_4bit"),
    "load_in_8bit": "model.quantization=bnb_8bit",
    **dict.fromkeys(("stage", "rl"), "+task=dpo, orpo, kto, reward or grpo"),
}
