"""The methods' terms of the loss, among the losses that a model returns."""

from torch import nn

from mmpeft.training.penalty import penalty


def add_penalty(model: nn.Module) -> None:
    """Let a model's dict of losses hold ``loss_peft`` where its methods have a term.

    mmengine sums and logs whatever has ``loss`` in its name.

    Args:
        model: Any ``BaseModel``, unwrapped.
    """
    model.register_forward_hook(_with_penalty, with_kwargs=True)


def _with_penalty(model, args, kwargs, losses):
    if kwargs.get('mode') != 'loss' or not isinstance(losses, dict):
        return None
    term = penalty(model)
    return None if term is None else {**losses, 'loss_peft': term}
