import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

dtype = torch.bfloat16
rank = 64
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="meta-llama/Llama-3.2-1B-Instruct",
    max_seq_length=512,
    load_in_4bit=True,
    fast_inference=False,
    max_lora_rank=rank,
    dtype=dtype,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=rank,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=rank,
    use_gradient_checkpointing=False,
    random_state=42,
)
dataset = load_dataset("json", data_files="train.jsonl", split="train")
arguments = SFTConfig(
    output_dir="sft_test",
    max_steps=100,
    per_device_train_batch_size=5,
    log_level="info",
    report_to="none",
    num_train_epochs=1,
    logging_steps=1,
    seed=42,
    bf16=dtype == torch.bfloat16,
    fp16=dtype == torch.float16,
    save_strategy="no",
)
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=arguments)
trainer.train()
