"""The `ingress` section of the YAML file: who may call, what a request may cost, what requests share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, model_validator

from cluster.config_values import DEFAULT_MAX_BODY_BYTES, Bytes, Section

PrefixCacheSalt = Literal["none", "api_key"]
ENVIRONMENT = "environment"  # of the validation's context: variables other than this process'
ApiKey = Annotated[str, Field(min_length=1)]


class IngressSection(Section):
    """The HTTP side.

    `api_keys` are accepted as `Authorization: Bearer`; `api_keys_env` names an environment variable
    with more of them, separated by commas, so that no key needs to stand in the file. Without any
    key the server is open.

    `admin_api_keys` and `admin_api_keys_env` are keys for everything, and the only ones for the routes
    that change the state of engines, such as `POST /trim`. Without any those routes are closed: a
    tenant that can empty the prefix cache slows all others down.

    `prefix_cache_salt: api_key` shares prefixes between requests of the same key only. A prompt that
    answers sooner tells that somebody asked it before; with it nobody learns that of another key's
    prompts, and a prompt that all keys share is computed and held once a key.
    """

    api_keys: tuple[ApiKey, ...] = Field(default=(), strict=False)
    api_keys_env: str | None = None
    admin_api_keys: tuple[ApiKey, ...] = Field(default=(), strict=False)
    admin_api_keys_env: str | None = None
    prefix_cache_salt: PrefixCacheSalt = "none"
    max_body_bytes: Bytes = DEFAULT_MAX_BODY_BYTES
    request_timeout_s: PositiveFloat | None = None
    num_replicas: PositiveInt = 1
    max_ongoing_requests: PositiveInt = 10_000

    @model_validator(mode="after")
    def _keys_exist(self, info: ValidationInfo) -> Self:
        environment = (info.context or {}).get(ENVIRONMENT, os.environ)
        for name in ("api_keys_env", "admin_api_keys_env"):
            variable = getattr(self, name)
            if variable is not None and not _keys_of(variable, environment):
                raise ValueError(f"{name}: the environment variable {variable} holds no key")
        if self.prefix_cache_salt == "api_key" and not self.api_keys + _keys_of(
            self.api_keys_env, environment
        ):
            raise ValueError(
                "prefix_cache_salt is api_key, but there are no keys: set api_keys or api_keys_env"
            )
        return self

    def all_api_keys(self) -> tuple[str, ...]:
        """The keys of the file and of the environment."""
        return self.api_keys + _keys_of(self.api_keys_env)

    def all_admin_api_keys(self) -> tuple[str, ...]:
        """The same for the routes that change the state of engines."""
        return self.admin_api_keys + _keys_of(self.admin_api_keys_env)


def _keys_of(variable: str | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys that an environment variable lists, separated by commas."""
    listed = environment.get(variable, "") if variable else ""
    return tuple(key.strip() for key in listed.split(",") if key.strip())
