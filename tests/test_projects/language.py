"""Small language models with random weights, and a tokenizer trained on texts."""

import transformers as hf
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing


def train_tokenizer(texts, vocabulary=700, extra=()):
    """A tokenizer of bytes, as LLaMA 3 has one, which begins each text with ``<s>``."""
    bpe = ByteLevelBPETokenizer()
    special = ['<pad>', '<s>', '</s>', *extra]
    bpe.train_from_iterator(texts, vocabulary, show_progress=False, special_tokens=special)
    bpe._tokenizer.post_processor = TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token='<pad>', bos_token='<s>', eos_token='</s>'
    )


def small_llama_config(words):
    """LLaMA with two layers, and weights that are large enough to be adapted in a few steps."""
    return hf.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def save_llama(folder, texts):
    """Save such a model, and a tokenizer of the texts, into a folder."""
    words = train_tokenizer(texts)
    hf.LlamaForCausalLM(small_llama_config(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
