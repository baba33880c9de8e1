# Reviews of movies (movies.py) with a small encoder, at equal budgets: see README.md.
model = 'sentence-transformers/all-MiniLM-L6-v2'
data = 'data/movies'
sentences = ('text',)
rows = 1000
training = dict(
    per_device_train_batch_size=16,
    per_device_eval_batch_size=50,
    num_train_epochs=2,
    lr_scheduler_type='linear',
    warmup_ratio=0.1,
    group_by_length=True,
    max_length=48,
    use_cpu=True,
)
tasks = dict()
tuning = dict(rows=700, held_out=300, seeds=2, kept=2)
rates = (3e-4, 1e-3, 3e-3, 1e-2)
budget = dict(budget=166_464)
methods = dict(
    frozen=dict(method='frozen', rates=rates),
    full=dict(method='full', rates=(1e-5, 3e-5, 1e-4, 3e-4)),
    bitfit=dict(method='bitfit', rates=rates),
    lora=dict(method='lora', arguments=budget, rates=rates),
    dora=dict(method='dora', arguments=budget, rates=rates),
    flora=dict(method='flora', arguments=dict(budget, scale='auto'), rates=rates),
    flora_factor=dict(
        method='flora', arguments=dict(budget, scale='auto', zero='factor0'), rates=rates
    ),
    liera=dict(method='liera', arguments=budget, rates=rates),
)
del rates, budget
