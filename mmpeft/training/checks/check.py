"""One kind of fault that a training run does not show by itself."""


class Check:
    """Looks for one fault, from its construction, which is the start of training, to the end.

    Args:
        monitor: The :class:`mmpeft.training.monitor.Monitor` that it is part of.

    Attributes:
        repeats: Look again before each checkpoint and at the end of the run.
    """

    repeats = True

    def __init__(self, monitor):
        self.monitor = monitor

    def is_due(self) -> bool:
        """Whether to look after this iteration; equal on all ranks."""
        return self.monitor.iterations == self.monitor.check_iters

    def problem(self) -> str | None:
        """What is wrong, as a paragraph; None if nothing is. All ranks call it together."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Before each step of the optimizer."""

    def after_step(self) -> None:
        """After each step of the optimizer."""

    def close(self) -> None:
        """The run is over."""
