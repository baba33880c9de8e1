# Visual instruction tuning of LLaVA-1.5-7B (arXiv:2310.03744) with adapters in its language model.
model = 'data/llava/vicuna-7b-clip336'  # made by assemble.py
data = 'data/llava/llava_v1_5_mix665k.json'
images = 'data/llava/images'

targets = dict(include=(r'language_model\.layers\.',))
unfreeze = (r'multi_modal_projector\.',)
dtype = 'bfloat16'  # of the frozen base; the projector trains in float32
frozen_dtype = None  # 'int8', 'fp8' or 'nf4' store it in fewer bits

cutoff = 2048  # tokens, those of the image included; what is longer loses its end
batch_size = 128  # of all processes together
projector_rate = 2e-5

# Arguments of transformers.TrainingArguments.
training = dict(
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=2e-4,
    lr_scheduler_type='cosine',
    warmup_ratio=0.03,
    weight_decay=0.0,
    bf16=True,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs=dict(use_reentrant=False),
    ddp_find_unused_parameters=True,  # a batch may have no image
    dataloader_num_workers=4,
    save_strategy='steps',
    save_steps=500,
    save_total_limit=1,
    logging_steps=10,
    report_to=[],
    seed=42,
)
# Arguments of transformers.GenerationConfig.
generation = dict(do_sample=False, max_new_tokens=128)
