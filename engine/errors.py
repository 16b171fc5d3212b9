"""Every exception Ballonet raises, and what the caller can do about it.

    BallonetError
    ├── ConfigError        the configuration cannot work; start-up stops, the message names the remedy
    ├── ModelLoadError     the model is missing, damaged or of a family that is not supported
    ├── RequestError       one request is wrong; its client gets a 4xx that names the parameter
    ├── OverloadedError    queues are full; the client should retry after `retry_after_s`
    ├── DriverError        the address-space driver refused a call (create, map, unmap)
    ├── ConservationError  chunks were lost or counted twice: a bug, never a user's mistake
    └── EngineDeadError    the step loop has ended; the replica has to be replaced

Shortage of memory is not among them: it is a value that the scheduler acts on.
All arguments go to the base constructor, so that every class survives pickling between processes.
"""

from __future__ import annotations


class BallonetError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(BallonetError):
    """The configuration cannot work. The message names the key and the remedy."""


class ModelLoadError(BallonetError):
    """The model cannot be loaded from its source."""


class RequestError(BallonetError):
    """One request cannot be served as asked.

    Args:
        message: what is wrong, in a sentence for the client.
        param: the name of the request's field that is at fault, if one is.
        code: OpenAI's machine-readable code, such as `context_length_exceeded`.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class OverloadedError(BallonetError):
    """The engine's queue is full.

    Args:
        message: what is full, with its limit.
        retry_after_s: seconds after which a retry has a fair chance.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class DriverError(BallonetError):
    """The address-space driver refused a call.

    Args:
        call: the driver function, such as `cuMemMap` or `mmap`.
        reason: what the driver answered.
    """

    def __init__(self, call: str, reason: str) -> None:
        super().__init__(call, reason)
        self.call = call
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.call} failed: {self.reason}"


class ConservationError(BallonetError):
    """free + owned + retiring no longer equals total, or a chunk is mapped where it should not be."""


class EngineDeadError(BallonetError):
    """The step loop has ended, with the cause in the message. The replica has to be replaced."""
