"""What TrainingArguments, TRL, LLaMA-Factory and axolotl call a setting, and what petl does."""

STEPS = "train.batch_size=N, the examples of a step, and train.micro_batch_size=N, those of a pass"
NAMES = {  # the names of others, by what is written here
    "train.run=FOLDER, or train.output of all runs": "output_dir save_dir run_name",
    "train.lr": "learning_rate lr",
    "train.epochs": "num_train_epochs num_epochs epochs",
    "train.steps": "max_steps steps",
    STEPS: "per_device_train_batch_size train_batch_size batch_size gradient_accumulation_steps "
    "micro_batch_size",
    "train.eval_batch_size": "per_device_eval_batch_size eval_batch_size",
    "train.warmup, a share below 1 or steps": "warmup_ratio warmup_steps",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "train.optimizer": "optim optimizer",
    "train.precision=bf16, or auto": "fp16 bf16",
    "train.log_steps": "logging_steps log_steps",
    "train.eval_steps=N, which keeps the best checkpoint": "eval_strategy evaluation_strategy "
    "eval_steps load_best_model_at_end metric_for_best_model",
    "train.save_steps": "save_strategy save_steps",
    "train.keep_checkpoints": "save_total_limit",
    "train.early_stopping": "early_stopping_patience",
    "train.num_workers": "dataloader_num_workers",
    "tracker=NAME": "report_to",
    "train.resume": "resume_from_checkpoint resume",
    "model=hub model.name=NAME, or model=path model.path=FOLDER": "model_name model_name_or_path "
    "base_model model_id",
    "data=files data.train=FILE, or data=hub data.name=NAME": "dataset datasets dataset_name "
    "train_file data_path",
    "data.test=FILE": "validation_file test_file",
    "data.max_length": "max_seq_length max_length max_seq_len sequence_len cutoff_len",
    "+method=NAME": "finetuning_type adapter peft_type",
    "method.r": "rank lora_rank lora_r r",
    "method.lora_alpha": "lora_alpha alpha",
    "method.lora_dropout": "lora_dropout dropout",
    "method.target_modules": "target_modules lora_target lora_target_modules",
    "model.quantization=bnb_4bit": "load_in_4bit quantization_bit",
    "model.quantization=bnb_8bit": "load_in_8bit",
    "+task=dpo, orpo, kto, reward or grpo": "stage rl",
}
SAME = ("gradient_checkpointing", "weight_decay", "max_grad_norm", "seed")
HERE = {name: f"train.{name}" for name in SAME}
HERE |= {name: written for written, names in NAMES.items() for name in names.split()}
