# What the runs share. Rate, batch, steps and sampler steps are LieRA's (arXiv:2504.00851, Sec. 8).
dtype = 'float32'  # of the frozen weights
subject = dict(images='data/dreambooth/dataset/cat', token='sks', class_name='cat')
prompt = 'a picture of a {}'  # of the subject's images
text_encoders = False  # whether they are adapted too
prior = dict(number=0, weight=1.0, images=None)  # images of the class; 0 for none

steps = 500
batch_size = 4  # images of the subject, in each process
accumulation = 1
lr = 1e-4
weight_decay = 1e-2
max_norm = 1.0  # of the gradients
seed = 0
save_every = 100

sampler = dict(num_inference_steps=50, guidance_scale=7.5)
prompts = [
    'a {} in the jungle',
    'a {} on the beach',
    'a {} with a mountain in the background',
    'a {} wearing a red hat',
]
default_hooks = dict(peft=dict(type='mmpeft.PEFTHook', targets=dict(module='')))
