"""Which agent a person means: an id, a unique beginning of one, a name, or TEAM/NAME; and what Tab offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from isolator.cli.session import Failure
from isolator.cli.text import escape

if TYPE_CHECKING:
    from isolator.client import Agent, Client

_ID_LENGTH: Final = 16
_FEWEST: Final = 2
_COMPLETION_TIMEOUT: Final = 1.0


def find_agent(client: Client, text: str) -> Agent:
    """The agent that is meant. A name stands before an id's beginning; live agents before those that ended.

    Raises:
        Failure: `agent_not_found`, or `agent_ambiguous` with the candidates' ids.
    """
    from isolator.client import ProblemError  # noqa: PLC0415 - loaded with the client anyway

    if len(text) == _ID_LENGTH and text.isalnum():
        try:
            return client.agent(text)
        except ProblemError as error:
            if error.status != 404:
                raise
    agents = client.agents()
    for meant in (lambda agent: _named(agent, text), lambda agent: agent.id.startswith(text)):
        found = [agent for agent in agents if meant(agent)]
        found = [agent for agent in found if agent.live] or found
        if found:
            return _only(found, text)
    # Removed agents answer to their id only: their names have passed to others.
    found = [agent for agent in client.agents(removed=True) if len(text) >= _FEWEST and agent.id.startswith(text)]
    if found:
        return _only(found, text)
    raise Failure(f"No agent is called {text!r}, nor has an id that begins so. See: isolator ps", "agent_not_found")


def _named(agent: Agent, text: str) -> bool:
    team, slash, name = text.partition("/")
    return (agent.team, agent.name) == (team, name) if slash else agent.name == text


def _only(found: list[Agent], text: str) -> Agent:
    if len(found) > 1:
        known = ", ".join(f"{agent.id} ({agent.team}/{agent.name})" for agent in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise Failure(
            f"{text!r} may mean {len(found)} agents: {known}{more}. Say TEAM/NAME or more of the id.",
            "agent_ambiguous",
            candidates=[agent.id for agent in found],
        )
    return found[0]


def _client_for_completion(context: click.Context) -> Client:
    from isolator.client import Client  # noqa: PLC0415 - only when Tab was pressed

    return Client(context.find_root().params.get("socket"), timeout=_COMPLETION_TIMEOUT)


class AgentReference(click.ParamType):  # type: ignore[type-arg] # generic in newer clicks only
    """An AGENT argument."""

    name = "agent"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Ids, TEAM/NAME and names that begin so; nothing when the daemon is slow or absent."""
        del param
        agents = _quietly(lambda: _client_for_completion(ctx).agents())
        words: dict[str, str] = {}
        for agent in agents:
            for word in (agent.name, f"{agent.team}/{agent.name}", agent.id):
                words.setdefault(word, f"{agent.team}, {agent.state}")
        return [
            CompletionItem(escape(word), help=escape(about))
            for word, about in words.items()
            if word.startswith(incomplete)
        ]


class TeamReference(click.ParamType):  # type: ignore[type-arg] # generic in newer clicks only
    """A TEAM argument or option."""

    name = "team"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Teams that begin so."""
        del param
        teams = _quietly(lambda: _client_for_completion(ctx).teams())
        return [CompletionItem(escape(team.id)) for team in teams if team.id.startswith(incomplete)]


def _quietly(ask: Any) -> list[Any]:
    from isolator.client import IsolatorClientError  # noqa: PLC0415 - as above

    try:
        answer: list[Any] = ask()
    except IsolatorClientError:
        return []
    return answer
