"""Language models whose head is the embedding: what is adapted, and what a merged file holds."""

import copy
import warnings

import pytest
import torch
import transformers as hf

import mmpeft
from mmpeft.errors import UsageError
from tests.hf_zoo import HF, WORDS

LORA, IDS = dict(type='LoRA', rank=2), torch.arange(6)[None]
CLOSE = dict(rtol=1e-10, atol=1e-10)


def build(name, tied):
    if name == 'gpt2':
        sizes = dict(vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, tie_word_embeddings=tied))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, tie_word_embeddings=tied))
    return model.double().eval()


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('name', ['gpt2', 'llama'])
@pytest.mark.parametrize('include', [(), ('lm_head', 'attn'), ('lm_head', 'embed_tokens|wte')])
def test_a_merged_file_holds_what_was_trained(name, tied, include, tmp_path):
    model = build(name, tied)
    plain = copy.deepcopy(model)
    if tied and not include:
        with pytest.warns(UserWarning, match='lm_head.weight is also .*(wte|embed_tokens).weight'):
            summary = mmpeft.inject(model, LORA)
        assert not any('lm_head' in row.name for row in summary.rows)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            kinds = ('conv', 'linear', 'embedding') if 'embed_tokens|wte' in include else None
            mmpeft.inject(model, LORA, dict(include=include, kinds=kinds))
    train(model)
    with torch.no_grad():
        adapted = model(IDS).logits
        mmpeft.merge(model, reversible=True)
        torch.testing.assert_close(model(IDS).logits, adapted, **CLOSE)
        stays = 'attn' not in include
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is (tied and stays)
        assert model.config.tie_word_embeddings is (tied and stays)
        torch.testing.assert_close(reloaded(model, tmp_path)(IDS).logits, adapted, **CLOSE)
        mmpeft.unmerge(model)
        assert torch.equal(model(IDS).logits, adapted)
        assert model.config.tie_word_embeddings is tied
        mmpeft.remove(model)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_a_tie_that_the_config_does_not_undo_is_refused():
    """T5 scales the input of its head if the head is tied."""
    model = HF['t5'].build()
    mmpeft.inject(model, LORA, dict(include='lm_head'))
    with pytest.raises(UsageError, match='shared.weight and lm_head.weight are one tied'):
        mmpeft.merge(model)
    assert model.config.tie_word_embeddings and model.peft
