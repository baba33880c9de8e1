"""Small networks of Hugging Face's libraries with random weights, and a loss of any network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A network and what it is called with.

    Attributes:
        build: Makes it.
        inputs: Makes the arguments of a call.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict | tuple]

    def loss(self, model: nn.Module) -> Tensor:
        """The mean square of all floating point tensors that a call returns."""
        given = self.inputs()
        output = model(**given) if isinstance(given, dict) else model(*given)
        return sum(y.square().mean() for y in tensors_in(output))


def tensors_in(node) -> list[Tensor]:
    """All floating point tensors in nested mappings and sequences."""
    if torch.is_tensor(node):
        return [node] if node.is_floating_point() else []
    children = node.values() if hasattr(node, 'values') else node
    return [
        t for c in children if isinstance(c, Tensor | list | tuple | dict) for t in tensors_in(c)
    ]


def hf_network(name, config, size=None, **inputs):
    """``inputs``: further arguments; ``size`` of an image, or word indices where it is None."""

    def given():
        if size is None:
            return dict(input_ids=torch.randint(3, 40, (2, 7))) | inputs
        return dict(pixel_values=torch.randn(2, 3, size, size)) | inputs

    return Network(lambda: getattr(hf, name)(config()), given)


WORDS = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=20,
)
VISION = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=32,
    patch_size=8,
)
HF = dict(
    bert=hf_network('BertModel', lambda: hf.BertConfig(**WORDS)),
    roberta=hf_network('RobertaModel', lambda: hf.RobertaConfig(**WORDS)),
    deberta=hf_network(
        'DebertaV2Model',
        lambda: hf.DebertaV2Config(
            **WORDS, relative_attention=True, pos_att_type='p2c|c2p', share_att_key=False
        ),
    ),
    vit=hf_network('ViTModel', lambda: hf.ViTConfig(**VISION), 32),
    dinov2=hf_network('Dinov2Model', lambda: hf.Dinov2Config(**VISION, mlp_ratio=2), 32),
    dinov3=hf_network('DINOv3ViTModel', lambda: hf.DINOv3ViTConfig(**VISION), 32),
    t5=hf_network(
        'T5ForConditionalGeneration',
        lambda: hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        decoder_input_ids=torch.zeros(2, 3, dtype=torch.long),
    ),
    gpt2=hf_network(
        'GPT2LMHeadModel',
        lambda: hf.GPT2Config(vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2),
    ),
    llama=hf_network(
        'LlamaForCausalLM',
        lambda: hf.LlamaConfig(**WORDS | dict(num_attention_heads=4), num_key_value_heads=2),
    ),
    clip=hf_network(
        'CLIPModel',
        lambda: hf.CLIPConfig(text_config=WORDS, vision_config=VISION, projection_dim=16),
        32,
        input_ids=torch.randint(3, 40, (2, 7)),
    ),
    clip_vision=hf_network('CLIPVisionModel', lambda: hf.CLIPVisionConfig(**VISION), 32),
    sam=hf_network(
        'SamModel',
        lambda: hf.SamConfig(
            vision_config=hf.SamVisionConfig(
                **VISION | dict(image_size=64, patch_size=16),
                output_channels=16,
                num_pos_feats=8,
                window_size=2,
                global_attn_indexes=(1,),
                mlp_dim=32,
            ),
            prompt_encoder_config=dict(
                hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4
            ),
            mask_decoder_config=dict(
                hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
            ),
        ),
        64,
        input_points=torch.tensor([[[[5.0, 5.0]]]] * 2),
    ),
    segformer=hf_network(
        'SegformerForSemanticSegmentation',
        lambda: hf.SegformerConfig(
            depths=(1, 1, 1, 1),
            hidden_sizes=(8, 8, 16, 16),
            num_attention_heads=(1, 2, 2, 2),
            decoder_hidden_size=16,
        ),
        64,
    ),
    detr=hf_network(
        'DetrModel',
        lambda: hf.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=hf.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 8],
                depths=[1, 1],
                layer_type='basic',
                out_features=['stage2'],
            ),
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=5,
        ),
        64,
    ),
    convnextv2=hf_network(
        'ConvNextV2Model',
        lambda: hf.ConvNextV2Config(hidden_sizes=(8, 8, 16, 16), depths=(1, 1, 2, 1)),
        64,
    ),
    dinov3_convnext=hf_network(
        'DINOv3ConvNextModel',
        lambda: hf.DINOv3ConvNextConfig(hidden_sizes=(8, 8, 16, 16), depths=(1, 1, 2, 1)),
        64,
    ),
    swin=hf_network(
        'SwinModel',
        lambda: hf.SwinConfig(
            image_size=64, embed_dim=8, depths=(1, 2), num_heads=(2, 2), window_size=4
        ),
        64,
    ),
)


def _unet(**changes):
    def build():
        import diffusers

        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
            **changes,
        )

    def inputs():
        added = dict(text_embeds=torch.randn(2, 16), time_ids=torch.ones(2, 6))
        return dict(
            sample=torch.randn(2, 4, 8, 8),
            timestep=torch.tensor([3, 5]),
            encoder_hidden_states=torch.randn(2, 5, 8),
            **(dict(added_cond_kwargs=added) if changes else {}),
        )

    return Network(build, inputs)


LLAMA = WORDS | dict(num_attention_heads=4, num_key_value_heads=2)
MORE = dict(
    llama_tied=hf_network(
        'LlamaForCausalLM', lambda: hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    ),
    mixtral=hf_network(
        'MixtralForCausalLM', lambda: hf.MixtralConfig(**LLAMA, num_local_experts=3, head_dim=4)
    ),
    llava=hf_network(
        'LlavaForConditionalGeneration',
        lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.LlamaConfig(**LLAMA | dict(max_position_embeddings=40)),
            image_token_index=49,
        ),
        32,
        input_ids=torch.tensor([[3, *[49] * 16, 4, 5]] * 2),
    ),
    mask2former=hf_network(
        'Mask2FormerForUniversalSegmentation',
        lambda: hf.Mask2FormerConfig(
            backbone_config=hf.SwinConfig(
                image_size=64,
                embed_dim=8,
                depths=(1, 1, 1, 1),
                num_heads=(1, 1, 2, 2),
                window_size=4,
                out_features=['stage1', 'stage2', 'stage3', 'stage4'],
            ),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=3,
            num_attention_heads=2,
            num_queries=5,
        ),
        64,
    ),
    sd_unet=_unet(),
    sdxl_unet=_unet(
        addition_embed_type='text_time',
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    ),
)
