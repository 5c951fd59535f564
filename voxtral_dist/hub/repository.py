"""A model repository on the Hugging Face hub: opened before an export is written, and uploaded to afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from voxtral_dist.config import is_hub_name
from voxtral_dist.errors import UserError
from voxtral_dist.exports.layouts import ExportLayout

# Weights of an older upload that would be loaded beside those of a new one, or in their place. The layouts of full
# models may share a repository.
_WEIGHTS: dict[ExportLayout, tuple[str, ...]] = {
    "hf": ("model*.safetensors", "model.safetensors.index.json"),
    "mistral": ("consolidated*.safetensors", "consolidated.safetensors.index.json"),
    "peft": ("adapter_model*.safetensors",),
    "vllm-lora": ("adapter_model*.safetensors",),
}
_REMEDIES = {
    401: "the hub does not accept the access token: log in by `hf auth login`, or set HF_TOKEN to a valid one",
    403: "the access token may not write there: use one with write permission, of an account that owns the repository "
    "or is a member of its organization",
    404: "the hub has no such repository, user or organization that the access token may see: correct the name",
}


@dataclass(frozen=True)
class Destination:
    """Where to push: the name of a repository, and whether everybody may see it if it is created or is public."""

    name: str
    is_public: bool = False


class HubRepository:
    """A repository that exists and that this user can see."""

    def __init__(self, api: HfApi, name: str, is_private: bool) -> None:
        self._api = api
        self.name = name
        self.is_private = is_private

    @classmethod
    def opened(cls, destination: Destination) -> HubRepository:
        """Find a repository, or create it, private unless asked otherwise.

        Raises:
            UserError: the hub cannot be reached or refuses, or the repository is public and may not be.
        """
        name = destination.name
        _refuse_unusable(name)
        api = HfApi()
        try:
            is_private = bool(api.repo_info(name).private)
        except RepositoryNotFoundError:
            is_private = not destination.is_public
            try:
                api.create_repo(name, private=is_private)
            except Exception as error:
                raise UserError(f"`--push`: {name} cannot be created: {_reason(error)}.") from error
        except Exception as error:
            raise UserError(f"`--push`: {name} cannot be opened: {_reason(error)}.") from error
        if not is_private and not destination.is_public:
            raise UserError(
                f"`--push`: {name} exists and is public: add `--public` if everybody may have this model, or choose "
                "another name."
            )
        return cls(api, name, is_private)

    @property
    def url(self) -> str:
        """The page of the repository."""
        return f"{self._api.endpoint}/{self.name}"

    def check_card(self, card: str) -> None:
        """Let the hub check the metadata of a model card, before gigabytes are written and sent.

        Raises:
            UserError: the hub refuses it, such as an unknown licence.
        """
        try:
            ModelCard(card).validate()
        except Exception as error:
            raise UserError(f"`--push`: the hub refuses the model card: {_reason(error)}.") from error

    def upload(self, folder: Path, layout: ExportLayout) -> None:
        """Upload a folder, and remove weights of older uploads in the same layout.

        huggingface_hub asks the hub which files, or parts of files, it has already, so that a repeated call resumes.

        Raises:
            UserError: the upload failed.
        """
        try:
            self._api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message=f"Upload of layout {layout} by voxtral-dist",
                delete_patterns=list(_WEIGHTS[layout]),
            )
        # Any failure has the same remedy, and the library and its transports raise many types.
        except Exception as error:
            raise UserError(
                f"`--push`: {folder} is written, but the upload to {self.name} failed: {_reason(error)}. Rerun the "
                "same command to resume: it sends only what is missing."
            ) from error


def _refuse_unusable(name: str) -> None:
    if constants.HF_HUB_OFFLINE:
        raise UserError("`--push` needs the hub, but HF_HUB_OFFLINE is set: unset it, or leave out `--push`.")
    if not is_hub_name(name):
        raise UserError(f"`--push` must be of the form USER/NAME or ORGANIZATION/NAME, but is {name!r} instead.")
    if get_token() is None:
        raise UserError(
            "`--push` needs an access token of the hub with write permission: log in by `hf auth login`, or set "
            "HF_TOKEN."
        )


def _reason(error: BaseException) -> str:
    """Why the hub refused or failed, in words without a final full stop."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    status = None if cause is None else cause.response.status_code
    # An invalid request is explained by the library's own error.
    if cause is None or status == 400:
        return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    said = f" ({cause.server_message.strip().rstrip('.')})" if cause.server_message else ""
    return _REMEDIES.get(cause.response.status_code, f"the hub answered with status {status}") + said
