"""The section `notify`: who is told how a run ended. No part of any result, and kept nowhere."""

from typing import Any
from urllib.parse import urlsplit

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from pipeline.settings.section import Section

FROM_ENVIRONMENT = "env:"
SCHEMES = ("http", "https")

Receiver = tuple[str, ...] | str


class NotifyConfig(Section):
    """Who is told: a command as a list, or the URL of a webhook, or `env:NAME` that holds one."""

    on_success: Receiver | None = Field(
        default=None, description="when a run has done something and ended well"
    )
    on_failure: Receiver | None = Field(
        default=None,
        description="when a run failed, also before it began, or `retrain` held all that is new",
    )
    on_promote: Receiver | None = Field(
        default=None, description="when a run made a version the champion"
    )
    timeout_s: float = Field(
        default=30.0, gt=0, le=600, description="for a command, and for each attempt at a webhook"
    )

    @field_validator("on_success", "on_failure", "on_promote", mode="wrap")
    @classmethod
    def _be_receiver(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """One sentence for all forms, without the value: it may be a secret."""
        try:
            found = validate(tuple(value) if isinstance(value, list) else value)
        except ValidationError:
            found = ()
        if isinstance(found, str):
            name = found.removeprefix(FROM_ENVIRONMENT)
            is_valid = bool(name) if name != found else is_webhook(found)
        else:
            is_valid = found is None or bool(found and found[0])
        if not is_valid:
            raise ValueError(
                "must be a command as a list, as ['mail', 'me@example.org'], a webhook's URL that "
                "begins with https:// or http://, or 'env:NAME'. Change it."
            )
        return found


def is_webhook(url: str) -> bool:
    """Whether a URL can be posted to."""
    try:
        parts = urlsplit(url)
        return parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no URL at all
        return False
