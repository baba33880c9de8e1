"""Runs of transformers' Trainer."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nan, nn
from torch.utils.data import Dataset

import mmpeft
from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.errors import MissingFileError, TrainingError, UsageError
from mmpeft.interop.transformers import PEFTCallback, PEFTTrainer
from tests.cases import randomize
from tests.hf_zoo import WORDS

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
ADALORA = dict(type='AdaLoRA', rank=1, warmup=1, settle=3, every=2)


class Sentences(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        words = torch.randint(3, 40, (6,), generator=torch.Generator().manual_seed(index))
        return dict(input_ids=words, labels=words)


def trainer_of(folder, method, callback=None, trainer=hf.Trainer, frozen_dtype=None, **arguments):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, attention_dropout=0.1))
    mmpeft.inject(model, method, dict(module='model'), frozen_dtype=frozen_dtype)
    arguments = hf.TrainingArguments(
        folder,
        **dict(
            max_steps=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=dict(use_reentrant=True),
            bf16=True,
            use_cpu=True,
            save_steps=4,
            learning_rate=0.01,
            report_to=[],
            disable_tqdm=True,
        )
        | arguments,
    )
    data = dict(train_dataset=Sentences(), eval_dataset=Sentences())
    if trainer is PEFTTrainer:
        return PEFTTrainer(model, arguments, callback=callback, **data)
    return trainer(model, arguments, callbacks=[callback or PEFTCallback()], **data)


def test_a_resumed_run_equals_one_that_ran_through_bit_by_bit(tmp_path):
    through = trainer_of(tmp_path / 'a', ADALORA)
    before = {k: v.clone() for k, v in through.model.state_dict().items()}
    through.train()
    after = through.model.state_dict()
    trained = [name for name, p in through.model.named_parameters() if p.requires_grad]
    still = [name for name in trained if torch.equal(before[name], after[name])]
    assert not [name for name in still if not name.endswith('lora_E')]  # taken away
    callback = next(c for c in through.callback_handler.callbacks if hasattr(c, 'monitor'))
    (allocator,) = callback.monitor.allocation.allocators
    assert allocator.step == 8 and allocator.kept

    resumed = trainer_of(tmp_path / 'a', ADALORA)
    resumed.train(resume_from_checkpoint=str(tmp_path / 'a/checkpoint-4'))
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, after[key]), key
    saved = torch.load(tmp_path / 'a/checkpoint-8/mmpeft.pt', weights_only=True)
    assert saved['iteration'] == 8

    elsewhere = trainer_of(tmp_path / 'b', ADALORA)
    with pytest.raises(MissingFileError, match=r'resumes at step 4, .*mmpeft\.pt.*resume_from='):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / 'a/checkpoint-4'))


def test_an_adapter_file_lies_in_each_checkpoint(tmp_path):
    trainer = trainer_of(tmp_path, dict(type='LoRA', rank=2))
    trainer.train()
    assert (tmp_path / 'checkpoint-4/adapter.safetensors').is_file()
    written = tmp_path / 'checkpoint-8/adapter.safetensors'
    torch.manual_seed(0)
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, attention_dropout=0.1))
    mmpeft.load_adapter(plain, written)
    trained = trainer.model.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in plain.state_dict().items())
    mmpeft.save_adapter(trainer.model, tmp_path / 'adapter.safetensors')
    assert read_adapter(tmp_path / 'adapter.safetensors')[0] == read_adapter(written)[0]


@pytest.mark.parametrize('frozen_dtype', [None, 'nf4'])
def test_checkpoints_with_the_adapter_alone(tmp_path, frozen_dtype):
    """They resume to the same bits, and the best one is loaded at the end."""
    options = dict(trainer=PEFTTrainer, frozen_dtype=frozen_dtype, save_total_limit=3)
    best = dict(eval_strategy='steps', eval_steps=2, save_steps=2, load_best_model_at_end=True)
    options |= dict(best, learning_rate=0.5, lr_scheduler_type='constant')  # the loss rises
    through = trainer_of(tmp_path, ADALORA, **options)
    through.train()
    folder = tmp_path / 'checkpoint-8'
    assert (folder / 'mmpeft.pt').is_file() and not list(folder.glob('*model*'))
    losses = [entry['eval_loss'] for entry in through.state.log_history if 'eval_loss' in entry]
    chosen = tmp_path / f'checkpoint-{2 * losses.index(min(losses)) + 2}'
    assert chosen != folder and through.state.best_model_checkpoint == str(chosen)
    last, after = read_adapter(folder / 'adapter.safetensors')[1], through.model.state_dict()
    kept = read_adapter(chosen / 'adapter.safetensors')[1]
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    through.save_model()
    assert read_adapter(tmp_path / 'adapter.safetensors')[1].keys() == kept.keys()

    options['load_best_model_at_end'] = False
    resumed = trainer_of(tmp_path, ADALORA, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-6'))
    after = resumed.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in last.items())


def test_the_penalty_is_added(tmp_path):
    def norm(weight, folder):
        trainer = trainer_of(
            tmp_path / folder, dict(type='LoRA', rank=2, mpc='o', mpc_weight=weight)
        )
        trainer.train()
        return mmpeft.penalty(trainer.model).item() / weight

    assert norm(1.0, 'strong') < 0.9 * norm(1e-9, 'weak')


def test_a_run_that_goes_wrong_stops_and_saves_nothing(tmp_path):
    trainer = trainer_of(tmp_path / 'nan', dict(type='LoRA', rank=2))
    trainer.model.model.norm.register_forward_hook(lambda *call: call[-1] * nan)
    expected = "up to iteration 3: loss is nan.*NaN appears first in 'model.norm'"
    with pytest.warns(UserWarning), pytest.raises(TrainingError, match=expected):
        trainer.train()

    class Write(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            model.model.norm.weight.data[0] += state.global_step == 2

    trainer = trainer_of(tmp_path / 'base', dict(type='LoRA', rank=2))
    trainer.add_callback(Write())
    with pytest.raises(TrainingError, match=r"frozen tensors changed .*'model\.norm\.weight'"):
        trainer.train()
    assert not list(tmp_path.rglob('checkpoint-*'))


def test_the_state_of_another_run_is_refused(tmp_path):
    model, other = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    for each in (model, other):
        mmpeft.inject(each, dict(type='LoRA', rank=2))
    state = SimpleNamespace(global_step=2, max_steps=4)
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    (tmp_path / 'checkpoint-2').mkdir()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    callback = PEFTCallback(save_adapters=False)
    callback.on_train_begin(
        args, SimpleNamespace(global_step=0, max_steps=4), None, model, optimizer
    )
    callback.on_save(args, state, None, model)
    callback.on_train_begin(args, state, None, model, optimizer)
    randomize(other)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], 0.1)
    with pytest.raises(UsageError, match='is of another run.*resume_from'):
        PEFTCallback().on_train_begin(args, state, None, other, optimizer)
