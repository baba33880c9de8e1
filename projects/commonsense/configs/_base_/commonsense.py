# The protocol of LLM-Adapters (arXiv:2304.01933), which LieRA's Table 3 follows.
data = 'data/commonsense/commonsense_170k.json'
sets = 'data/commonsense/dataset'

targets = dict(include=(r'\.(q|k|v|up|down)_proj\.',))
dtype = 'bfloat16'  # of the frozen base
frozen_dtype = None  # 'int8', 'fp8' or 'nf4' store it in fewer bits

cutoff = 256  # tokens of prompt and answer; what is longer loses its end
train_on_prompt = True  # the loss is over the prompt's tokens too
held_out = 120  # examples whose loss chooses the checkpoint; the last one if 0
batch_size = 16  # of all processes together

# Arguments of transformers.TrainingArguments.
training = dict(
    num_train_epochs=3,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=8,
    lr_scheduler_type='linear',
    warmup_steps=100,
    weight_decay=0.0,
    optim='adamw_torch',
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs=dict(use_reentrant=False),
    eval_strategy='steps',
    eval_steps=400,
    save_strategy='steps',
    save_steps=400,
    save_total_limit=2,
    load_best_model_at_end=True,
    logging_steps=10,
    report_to=[],
    seed=42,
)
# Arguments of transformers.GenerationConfig.
generation = dict(num_beams=4, do_sample=False, max_new_tokens=32)
