"""Runs of other libraries' loops, stopped and resumed bit by bit."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import mmpeft
from tests.allocating import network, trainable

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
METHOD = dict(type='AdaLoRA', rank=2, warmup=1, settle=3, every=2)
STEPS = 8


def adapted():
    model = network().float()
    mmpeft.inject(model, METHOD)
    return model


def batches():
    for step in range(2 * STEPS):
        generator = torch.Generator().manual_seed(step)
        yield torch.randn(4, 3, 6, 6, generator=generator), torch.arange(4)


def same(a, b):
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def with_accelerate(folder, stop=None, resume=False):
    accelerator = Accelerator(cpu=True, mixed_precision='bf16', gradient_accumulation_steps=2)
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), 0.02)
    model, optimizer = accelerator.prepare(model, optimizer)
    monitor = mmpeft.monitor(model, optimizer, steps=STEPS)
    accelerator.register_for_checkpointing(monitor)
    if resume:
        accelerator.load_state(folder)
    for number, (images, labels) in enumerate(batches()):
        if resume and number < 8:
            continue
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(images), labels) + mmpeft.penalty(model)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if stop and number + 1 == 2 * stop:
            accelerator.save_state(folder)
    assert monitor.iteration == STEPS
    assert [allocator.step for allocator in monitor.allocation.allocators] == [STEPS]
    monitor.close()
    return accelerator.unwrap_model(model).state_dict()


def test_accelerate(tmp_path):
    through = with_accelerate(tmp_path, stop=4)
    same(with_accelerate(tmp_path, resume=True), through)


def test_lightning(tmp_path):
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = adapted()

        def training_step(self, batch, number):
            images, labels = batch
            loss = nn.functional.cross_entropy(self.net(images), labels)
            return loss + mmpeft.penalty(self.net)

        def configure_optimizers(self):
            return torch.optim.AdamW(trainable(self), 0.02)

        def on_train_start(self):
            steps = self.trainer.estimated_stepping_batches
            self.monitor = mmpeft.monitor(self, self.optimizers(), steps)
            if self.resumed:
                self.monitor.load_state_dict(self.resumed)

        resumed = None

        def on_load_checkpoint(self, checkpoint):
            self.resumed = checkpoint['mmpeft']

        def on_save_checkpoint(self, checkpoint):
            checkpoint['mmpeft'] = self.monitor.state_dict()

        def on_train_end(self):
            self.monitor.close()

    def run(resume=None):
        module = Module()
        save = lightning.callbacks.ModelCheckpoint(
            tmp_path, '{step}', every_n_epochs=1, save_top_k=-1
        )
        trainer = lightning.Trainer(
            accelerator='cpu',
            precision='bf16-mixed',
            max_epochs=2,
            accumulate_grad_batches=2,
            callbacks=[save],
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        loader = DataLoader(list(batches())[:STEPS], batch_size=None)
        trainer.fit(module, loader, ckpt_path=resume)
        assert module.monitor.iteration == STEPS
        assert [a.step for a in module.monitor.allocation.allocators] == [STEPS]
        return module.net.state_dict()

    through = run()
    same(run(resume=str(tmp_path / 'step=4.ckpt')), through)
