"""An admin's table: accounts over several pages, with search and order; edit, create, delete; the site's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from shoal.envs.web.sites.site import (
    Form,
    Refused,
    Site,
    cell,
    choice,
    field,
    form,
    lines,
    link,
    table,
    text,
    tick,
)
from shoal.envs.web.sites.words import TOWNS, email, people

ROLES = ("Reader", "Editor", "Admin")
LANGUAGES = ("English", "French", "Spanish")
NUM_ACCOUNTS = 12
PAGE_ROWS = 5


@dataclass
class Account:
    number: int
    name: str
    mail: str
    role: str
    active: bool
    logins: int


class Admin(Site):
    host = "admin.test"
    title = "Accounts"
    menu = {"/": "Accounts", "/new": "New account", "/settings": "Settings"}

    def fill(self, rng: Random, content: Random) -> None:
        logins = content.sample(range(3, 400), NUM_ACCOUNTS)
        self.accounts = {
            number: Account(
                number, name, email(name), content.choice(ROLES), content.random() < 0.8, logins[number - 1]
            )
            for number, name in enumerate(people(content, NUM_ACCOUNTS), start=1)
        }
        self.site_name = f"{content.choice(TOWNS)} Archive"
        self.language = content.choice(LANGUAGES)
        self.open = content.random() < 0.5

    def state(self) -> Any:
        accounts = [asdict(account) for account in self.accounts.values()]
        return accounts, self.site_name, self.language, self.open

    def named(self, name: str) -> Account:
        return next(one for one in self.accounts.values() if one.name == name)

    def create(self, name: str, mail: str, role: str) -> None:
        if not name or "@" not in mail or role not in ROLES:
            raise Refused("An account needs a name, an email address and a role.")
        number = max(self.accounts, default=0) + 1
        self.accounts[number] = Account(number, name, mail, role, True, 0)

    def change(self, account: Account, mail: str, role: str, active: bool) -> None:
        if "@" not in mail or role not in ROLES:
            raise Refused("An account needs an email address and a role.")
        account.mail, account.role, account.active = mail, role, active

    def delete(self, account: Account) -> None:
        del self.accounts[account.number]

    def show(self, path: Sequence[str], query: Form) -> tuple[str, str] | None:
        match path:
            case []:
                return self.title, self._rows(query)
            case ["new"]:
                fields = (field("Name", "name"), field("Email", "mail"), choice("Role", "role", ROLES))
                return "New account", form("/new", *fields, button="Create account")
            case ["settings"]:
                fields = (
                    field("Site name", "name", self.site_name),
                    choice("Language", "language", LANGUAGES, self.language),
                    tick("Open for new members", "open", self.open),
                )
                return "Settings", form("/settings", *fields, button="Save")
            case ["account", number]:
                account = self._numbered(number)
                return None if account is None else (account.name, self._edit(account))
            case ["account", number, "delete"]:
                account = self._numbered(number)
                if account is None:
                    return None
                sure = form(f"/account/{number}/delete", button="Yes, delete")
                return f"Delete {account.name}?", sure + link(f"/account/{number}", "No, go back")
        return None

    def _numbered(self, number: str) -> Account | None:
        return self.accounts.get(int(number)) if number.isdecimal() and len(number) < 6 else None

    def _rows(self, query: Form) -> str:
        asked, order = query.get("q", ""), query.get("sort", "")
        found = [one for one in self.accounts.values() if asked.casefold() in one.name.casefold()]
        if order == "logins":
            found.sort(key=lambda one: -one.logins)
        elif order == "name":
            found.sort(key=lambda one: one.name)
        page = int(query["page"]) if query.get("page", "").isdecimal() and len(query["page"]) < 4 else 0
        shown = found[page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
        rows = (
            (link(f"/account/{one.number}", one.name), one.role, "active" if one.active else "off", cell(one.logins))
            for one in shown
        )
        keep = f"q={asked}&sort={order}"
        onward = [link(f"/?{keep}&page={page - 1}", "Previous page")] if page else []
        if len(found) > (page + 1) * PAGE_ROWS:
            onward.append(link(f"/?{keep}&page={page + 1}", "Next page"))
        search = form("/", field("Name", "q", asked), button="Search", method="get")
        orders = [link("/?sort=name", "By name"), link("/?sort=logins", "By logins")]
        head = ("Name", "Role", "Status", "Logins")
        return search + lines(orders) + (table(head, rows) if shown else text("There is none.")) + lines(onward)

    def _edit(self, account: Account) -> str:
        at = f"/account/{account.number}"
        fields = (
            field("Email", "mail", account.mail),
            choice("Role", "role", ROLES, account.role),
            tick("Active", "active", account.active),
        )
        return (
            text(f"{account.logins} logins.")
            + form(at, *fields, button="Save")
            + link(f"{at}/delete", "Delete this account")
        )

    def submit(self, path: Sequence[str], form: Form) -> str | None:
        match path:
            case ["new"]:
                self.create(form.get("name", ""), form.get("mail", ""), form.get("role", ""))
                return f"/account/{max(self.accounts)}"
            case ["settings"]:
                if form.get("language") not in LANGUAGES or not form.get("name"):
                    raise Refused("A site needs a name and a language.")
                self.site_name, self.language, self.open = form["name"], form["language"], "open" in form
                return "/settings"
            case ["account", number, *rest]:
                account = self._numbered(number)
                if account is None or rest not in ([], ["delete"]):
                    return None
                if rest:
                    self.delete(account)
                    return "/"
                self.change(account, form.get("mail", ""), form.get("role", ""), "active" in form)
                return f"/account/{number}"
        return None
