"""What goes wrong, in one sentence each: what was given, what was expected, what to do."""


class LvlmDecodeError(ValueError):
    """Base of every error this library raises on purpose."""


class UnknownNameError(LvlmDecodeError):
    """A method, family, drafter, parameter or rule that no registry knows."""


class ParameterError(LvlmDecodeError):
    """A hyper-parameter outside its range."""


class UnsupportedError(LvlmDecodeError):
    """A setting, model family or combination that a method cannot honour."""


class InputError(LvlmDecodeError):
    """Inputs that contradict each other or the model: images and placeholders, batch sizes, missing prompts."""


class DependencyError(LvlmDecodeError):
    """A library that is missing or too old for this one."""
