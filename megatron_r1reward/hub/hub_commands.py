"""`r1reward hub card|push|fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_r1reward.model_folder.prompt_policy import own_policy
from megatron_r1reward.user_errors import user_errors

app = typer.Typer(no_args_is_help=True, help="A trained model on the Hugging Face Hub: its card, push, fetch.")

Endpoint = Annotated[str | None, typer.Option(help="another server than HF_ENDPOINT or huggingface.co")]
TokenVariable = Annotated[str, typer.Option(help="variable with the Hub's token")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="that `sft` or `rl` exported: <output_dir>/hf")]


@app.command()
def card(
    folder: Folder,
    name: Annotated[str | None, typer.Option(help="ORG/NAME in the snippets; default: the folder")] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="an evaluation.json of these weights; default: those beside the run")
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="the Hub's name of a licence")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a README.md that somebody else wrote")] = False,
) -> None:
    """Write README.md from what the run recorded: data, recipe, scores in both orders, prompt, how to use it."""
    with user_errors():
        own_policy(folder)  # before what writes the card is imported
        from megatron_r1reward.hub.model_card import write_card

        typer.echo(f"wrote {write_card(folder, name=name, evaluations=evaluation or (), licence=licence, force=force)}")


@app.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME")],
    revision: Annotated[str | None, typer.Option(help="branch; made where there is none; default: main")] = None,
    private: Annotated[bool, typer.Option("--private", help="a new repository that only its owner sees")] = False,
    endpoint: Endpoint = None,
    token_variable: TokenVariable = "HF_TOKEN",
) -> None:
    """Upload a trained folder; prints the name that `model.path` takes."""
    with user_errors():
        own_policy(folder)
        from megatron_r1reward.hub import repository as hub

        token = hub.token_in(token_variable)
        typer.echo(hub.push(folder, repository, revision=revision, private=private, endpoint=endpoint, token=token))


@app.command()
def fetch(
    models: Annotated[list[str], typer.Argument(metavar="ORG/NAME@REVISION|RUN.toml...")],
    endpoint: Endpoint = None,
    token_variable: TokenVariable = "HF_TOKEN",
) -> None:
    """Bring models into this machine's cache (HF_HOME), for nodes without a network; prints their folders."""
    with user_errors():
        from megatron_r1reward.hub import repository as hub

        for name in [name for argument in models for name in hub.names_in(argument)]:
            typer.echo(hub.fetch(name, endpoint=endpoint, token=hub.token_in(token_variable)))
