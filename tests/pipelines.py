"""Pipelines of Stable Diffusion and SDXL with random weights, small enough to train in a test."""

import json
from pathlib import Path

import diffusers
import tokenizers
import torch
import transformers as hf
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

WORDS = (
    'a picture of a sks cat in the jungle on the beach wearing a red hat with a mountain',
    'a dog in the snow and a cat in the background of a street',
)


def tokenizer(folder: Path) -> hf.CLIPTokenizer:
    """A byte pair encoding of CLIP's kind, trained on a few words."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix='</w>'))
    split = Split(tokenizers.Regex(r'[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+'), 'removed', invert=True)
    bpe.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix='</w>', show_progress=False
    )
    bpe.train_from_iterator(WORDS, trainer)
    made = json.loads(bpe.to_str())['model']
    words = [*made['vocab'], *(f'{c}</w>' for c in alphabet if f'{c}</w>' not in made['vocab'])]
    words += ['<|startoftext|>', '<|endoftext|>']
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(json.dumps({word: n for n, word in enumerate(words)}))
    merges = ['#version: 0.2', *(' '.join(pair) for pair in made['merges'])]
    (folder / 'merges.txt').write_text('\n'.join(merges) + '\n')
    return hf.CLIPTokenizer(folder / 'vocab.json', folder / 'merges.txt', model_max_length=24)


def text_config(words: hf.CLIPTokenizer, **more) -> hf.CLIPTextConfig:
    return hf.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=16,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **more,
    )


def pipeline_folder(folder: Path, sdxl: bool) -> Path:
    """Write a pipeline; its images have 32 x 32 pixels, its latents 16 x 16."""
    torch.manual_seed(0)
    words = tokenizer(folder.with_name(f'{folder.name}_words'))
    more = dict(
        addition_embed_type='text_time',
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        cross_attention_dim=32 if sdxl else 16,
        attention_head_dim=8,
        norm_num_groups=4,
        **(more if sdxl else {}),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
    parts = dict(
        unet=unet,
        vae=vae,
        text_encoder=hf.CLIPTextModel(text_config(words)),
        tokenizer=words,
        scheduler=diffusers.DDIMScheduler(**schedule, clip_sample=False, steps_offset=1),
    )
    if sdxl:
        second = hf.CLIPTextModelWithProjection(text_config(words, hidden_act='gelu'))
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=words
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return folder


def clip_folder(folder: Path) -> Path:
    """Write a CLIP, whose vision tower also serves as the model of images alone."""
    torch.manual_seed(1)
    words = tokenizer(folder)
    vision = hf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    config = hf.CLIPConfig(text_config(words).to_dict(), vision.to_dict(), projection_dim=16)
    hf.CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    sizes = dict(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    hf.CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def dino_folder(folder: Path) -> Path:
    """Write a vision transformer of DINO's kind."""
    torch.manual_seed(2)
    config = hf.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    hf.ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(folder)
    return folder
