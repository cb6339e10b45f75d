"""What is asked of the admin's table."""

from __future__ import annotations

from random import Random

from shoal.envs.web.actions import Click, Select, Stop, Type
from shoal.envs.web.policy import Policy, nodes, one
from shoal.envs.web.sites.admin import LANGUAGES, ROLES, Admin
from shoal.envs.web.sites.template import Params, Template
from shoal.envs.web.sites.words import FIRST, LAST, TOWNS, email
from shoal.envs.web.tree import Page


class AdminTask(Template[Admin]):
    site = Admin

    def draw(self, site: Admin, rng: Random) -> Params:
        account = rng.choice(list(site.accounts.values()))
        role = rng.choice([role for role in ROLES if role != account.role])
        return {"name": account.name, "role": role}


class OnAccount(AdminTask):
    """A task that begins by looking an account up."""

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Type(one(page, "textbox", "Name"), p["name"], enter=True)
        page = yield Click(one(page, "link", p["name"]))
        yield from self.there(page, p)

    def there(self, page: Page, p: Params) -> Policy:
        """What to do on the account's page."""
        raise NotImplementedError


def cells(page: Page) -> list[str]:
    """The cells of the table, row by row; not the names, which are links."""
    return [node.name for node in nodes(page, where=lambda node: node.role in ("cell", "gridcell"))]


class RoleOf(AdminTask):
    level = 1
    words = ("Which role has {name}?", "Look up the role of {name}.")

    def answer(self, site: Admin, p: Params) -> str:
        return site.named(p["name"]).role

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Type(one(page, "textbox", "Name"), p["name"], enter=True)
        yield Stop(cells(page)[0])


class MailOf(OnAccount):
    level = 1
    words = ("What is the email address of {name}?", "Give the email address of the account {name}.")

    def answer(self, site: Admin, p: Params) -> str:
        return site.named(p["name"]).mail

    def there(self, page: Page, p: Params) -> Policy:
        field = page.find(one(page, "textbox", "Email"))
        yield Stop(field.value if field is not None else "")


class SetRole(OnAccount):
    level = 2
    words = ("Give {name} the role {role}.", "Make {name} a {role}.")

    def do(self, site: Admin, p: Params) -> None:
        site.named(p["name"]).role = p["role"]

    def there(self, page: Page, p: Params) -> Policy:
        page = yield Select(one(page, "combobox", "Role"), p["role"])
        yield Click(one(page, "button", "Save"))


class SwitchActive(OnAccount):
    level = 2
    words = ("Switch the account of {name} {state}.", "The account of {name} should be {state}.")

    def draw(self, site: Admin, rng: Random) -> Params:
        account = rng.choice(list(site.accounts.values()))
        return {"name": account.name, "state": "off" if account.active else "on"}

    def do(self, site: Admin, p: Params) -> None:
        site.named(p["name"]).active = p["state"] == "on"

    def there(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "checkbox", "Active"))
        yield Click(one(page, "button", "Save"))


class ChangeMail(OnAccount):
    level = 2
    words = (
        "Change the email address of {name} to {mail}.",
        "{name} can be reached at {mail} now: change the account.",
    )

    def draw(self, site: Admin, rng: Random) -> Params:
        return {**super().draw(site, rng), "mail": email(f"{rng.choice(LAST)} {rng.randint(10, 99)}")}

    def do(self, site: Admin, p: Params) -> None:
        site.named(p["name"]).mail = p["mail"]

    def there(self, page: Page, p: Params) -> Policy:
        page = yield Type(one(page, "textbox", "Email"), p["mail"], enter=False)
        yield Click(one(page, "button", "Save"))


class CreateAccount(AdminTask):
    level = 2
    words = (
        "Create an account for {name}, {mail}, with the role {role}.",
        "New account: name {name}, email {mail}, role {role}.",
    )

    def draw(self, site: Admin, rng: Random) -> Params:
        used = {account.name.partition(" ")[0] for account in site.accounts.values()}
        name = f"{rng.choice([first for first in FIRST if first not in used])} {rng.choice(LAST)}"
        return {"name": name, "mail": email(name), "role": rng.choice(ROLES)}

    def do(self, site: Admin, p: Params) -> None:
        site.create(p["name"], p["mail"], p["role"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "New account"))
        page = yield Type(one(page, "textbox", "Name"), p["name"], enter=False)
        page = yield Type(one(page, "textbox", "Email"), p["mail"], enter=False)
        if p["role"] != ROLES[0]:
            page = yield Select(one(page, "combobox", "Role"), p["role"])
        yield Click(one(page, "button", "Create account"))


class DeleteAccount(OnAccount):
    level = 2
    words = ("Delete the account of {name}.", "{name} has left: delete the account.")

    def do(self, site: Admin, p: Params) -> None:
        site.delete(site.named(p["name"]))

    def there(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Delete this account"))
        yield Click(one(page, "button", "Yes, delete"))


class ChangeSettings(AdminTask):
    level = 2
    words = (
        'In the settings, name the site "{site}" and set the language to {language}.',
        'The site should be called "{site}" and be in {language}: change the settings.',
    )

    def draw(self, site: Admin, rng: Random) -> Params:
        language = rng.choice([one for one in LANGUAGES if one != site.language])
        return {"site": f"{rng.choice(TOWNS)} Library", "language": language}

    def do(self, site: Admin, p: Params) -> None:
        site.site_name, site.language = p["site"], p["language"]

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Settings"))
        page = yield Type(one(page, "textbox", "Site name"), p["site"], enter=False)
        page = yield Select(one(page, "combobox", "Language"), p["language"])
        yield Click(one(page, "button", "Save"))


class CountRole(AdminTask):
    level = 3
    words = ("How many accounts have the role {role}?", "Count the accounts whose role is {role}.")

    def draw(self, site: Admin, rng: Random) -> Params:
        return {"role": rng.choice(ROLES)}

    def answer(self, site: Admin, p: Params) -> str:
        return str(sum(account.role == p["role"] for account in site.accounts.values()))

    def solve(self, page: Page, p: Params) -> Policy:
        count = cells(page).count(p["role"])
        while nodes(page, "link", "Next page"):
            page = yield Click(one(page, "link", "Next page"))
            count += cells(page).count(p["role"])
        yield Stop(str(count))


class PromoteBusiest(AdminTask):
    level = 3
    words = ("Give the account with the most logins the role {role}.", "Whoever logged in most often becomes {role}.")

    def draw(self, site: Admin, rng: Random) -> Params:
        busiest = max(site.accounts.values(), key=lambda account: account.logins)
        return {"role": rng.choice([role for role in ROLES if role != busiest.role])}

    def do(self, site: Admin, p: Params) -> None:
        max(site.accounts.values(), key=lambda account: account.logins).role = p["role"]

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "By logins"))
        table = nodes(page, "table")[0]
        page = yield Click(next(node.id for node in table.walk() if node.role == "link"))
        page = yield Select(one(page, "combobox", "Role"), p["role"])
        yield Click(one(page, "button", "Save"))


TEMPLATES = (
    RoleOf(),
    MailOf(),
    SetRole(),
    SwitchActive(),
    ChangeMail(),
    CreateAccount(),
    DeleteAccount(),
    ChangeSettings(),
    CountRole(),
    PromoteBusiest(),
)
