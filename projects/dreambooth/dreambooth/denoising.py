"""The loss of DreamBooth, with the prior preservation of its Eq. 2 (arXiv:2208.12242)."""

import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from mmpeft.errors import UsageError

from .models import Pipeline


def encode_prompts(pipeline: Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
    """Embeddings (n, words, channels), and SDXL's of whole prompts (n, channels).

    Gradients reach text encoders that are adapted.
    """
    encoded = pipeline.encode_prompt(
        prompt=prompts,
        device=pipeline.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return encoded[0], encoded[2] if len(encoded) > 2 else None


class Denoising(nn.Module):
    """The loss of a batch, in one module with all that trains, as DDP wants it.

    Args:
        pipeline: With adapters.
        parts: What of it is adapted.
        prompts: Of the subject's images and, with prior preservation, of those of its class.
        prior_weight: Of the loss on the latter, lambda.

    Raises:
        UsageError: The model predicts neither the noise nor the velocity.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        parts: dict[str, nn.Module],
        prompts: list[str],
        prior_weight: float,
    ):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.pipeline, self.prompts, self.prior_weight = pipeline, prompts, prior_weight
        self.noise = DDPMScheduler.from_config(pipeline.scheduler.config)
        if self.noise.config.prediction_type not in ('epsilon', 'v_prediction'):
            raise UsageError(
                f'The model predicts {self.noise.config.prediction_type!r}, and this trains models '
                "that predict 'epsilon' or 'v_prediction'."
            )
        with torch.no_grad():
            self.text = None if len(parts) > 1 else encode_prompts(pipeline, prompts)

    def forward(self, moments: Tensor, sizes: Tensor, prompt: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            moments: Of the latents, (n, 2 channels, height, width).
            sizes: SDXL's conditions, (n, 6).
            prompt: Which prompt each image has, (n,); 1 is that of the class.
        """
        scale = self.pipeline.vae.config.scaling_factor
        latents = DiagonalGaussianDistribution(moments).sample() * scale
        noise = torch.randn_like(latents)
        last = self.noise.config.num_train_timesteps
        times = torch.randint(last, (len(latents),), device=latents.device)
        noisy = self.noise.add_noise(latents, noise, times)
        words, whole = self.text or encode_prompts(self.pipeline, self.prompts)
        added = None if whole is None else dict(text_embeds=whole[prompt], time_ids=sizes)
        unet = self.parts['unet']
        predicted = unet(noisy.to(unet.dtype), times, words[prompt], added_cond_kwargs=added).sample
        velocity = self.noise.config.prediction_type == 'v_prediction'
        target = self.noise.get_velocity(latents, noise, times) if velocity else noise
        errors = (predicted.float() - target).square().flatten(1).mean(1)
        loss = errors[prompt == 0].mean()
        if len(self.prompts) > 1:
            loss = loss + self.prior_weight * errors[prompt == 1].mean()
        return loss
