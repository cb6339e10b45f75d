"""What is asked of the forum."""

from __future__ import annotations

from random import Random

from shoal.envs.web.actions import Click, Stop, Type
from shoal.envs.web.policy import Policy, one, texts
from shoal.envs.web.sites.forum import REMARKS, Forum
from shoal.envs.web.sites.template import Params, Template
from shoal.envs.web.sites.words import TOPICS, TOWNS
from shoal.envs.web.tree import Page


class ForumTask(Template[Forum]):
    site = Forum

    def draw(self, site: Forum, rng: Random) -> Params:
        thread = rng.choice(site.threads)
        return {"board": thread.board, "title": thread.title, "text": f"{rng.choice(TOWNS)} has {rng.choice(TOPICS)}"}

    def solve(self, page: Page, p: Params) -> Policy:
        """Go to the thread, then `there`."""
        page = yield Click(one(page, "link", p["board"]))
        page = yield Click(one(page, "link", p["title"]))
        yield from self.there(page, p)

    def there(self, page: Page, p: Params) -> Policy:
        """What to do on the thread's page."""
        raise NotImplementedError


def posts(page: Page) -> list[str]:
    """The posts of a thread's page, as it shows them."""
    return [text for text in texts(page) if text.endswith(" likes)")]


class Reply(ForumTask):
    level = 1
    words = (
        'Reply "{text}" in the thread "{title}" on the board {board}.',
        'Answer the {board} thread "{title}" with: "{text}"',
    )

    def do(self, site: Forum, p: Params) -> None:
        site.reply(site.thread(p["title"]), p["text"])

    def there(self, page: Page, p: Params) -> Policy:
        page = yield Type(one(page, "textbox", "Text"), p["text"], enter=False)
        yield Click(one(page, "button", "Send"))


class Follow(ForumTask):
    level = 1
    words = ('Follow the thread "{title}" ({board}).', 'Board {board}: follow "{title}".')

    def do(self, site: Forum, p: Params) -> None:
        site.thread(p["title"]).followed = True

    def there(self, page: Page, p: Params) -> Policy:
        yield Click(one(page, "button", "Follow"))


class CountPosts(ForumTask):
    level = 1
    words = ('How many posts has the thread "{title}" in {board}?', 'Count the posts of "{title}" ({board}).')

    def answer(self, site: Forum, p: Params) -> str:
        return str(len(site.thread(p["title"]).posts))

    def there(self, page: Page, p: Params) -> Policy:
        yield Stop(str(len(posts(page))))


class LastAuthor(ForumTask):
    level = 1
    words = (
        'Who wrote last in the thread "{title}" ({board})?',
        'Name the author of the last post in "{title}", {board}.',
    )

    def answer(self, site: Forum, p: Params) -> str:
        return site.thread(p["title"]).posts[-1].author

    def there(self, page: Page, p: Params) -> Policy:
        yield Stop(posts(page)[-1].partition(":")[0])


class Like(ForumTask):
    level = 2
    words = ('Like the post of {author} in "{title}" ({board}).', 'In {board}, "{title}": like what {author} wrote.')

    def draw(self, site: Forum, rng: Random) -> Params:
        p = super().draw(site, rng)
        authors = [post.author for post in site.thread(p["title"]).posts if post.author != site.me]
        return {**p, "author": rng.choice(authors)}

    def do(self, site: Forum, p: Params) -> None:
        site.like(next(post for post in site.thread(p["title"]).posts if post.author == p["author"]))

    def there(self, page: Page, p: Params) -> Policy:
        yield Click(one(page, "button", f"Like {p['author'].partition(' ')[0]}"))


class LikeAndReply(Like):
    level = 3
    words = (
        'In the {board} thread "{title}", like the post of {author} and reply "{text}".',
        'Thread "{title}" ({board}): like {author}\'s post, then answer "{text}".',
    )

    def do(self, site: Forum, p: Params) -> None:
        super().do(site, p)
        site.reply(site.thread(p["title"]), p["text"])

    def there(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "button", f"Like {p['author'].partition(' ')[0]}"))
        page = yield Type(one(page, "textbox", "Text"), p["text"], enter=False)
        yield Click(one(page, "button", "Send"))


class DeleteMine(ForumTask):
    level = 2
    words = (
        'Delete your own post in the thread "{title}" on {board}.',
        'Remove what you wrote in "{title}" ({board}).',
    )

    def draw(self, site: Forum, rng: Random) -> Params:
        mine = [one for one in site.threads if any(post.author == site.me for post in one.posts)]
        thread = rng.choice(mine)
        return {"board": thread.board, "title": thread.title}

    def do(self, site: Forum, p: Params) -> None:
        thread = site.thread(p["title"])
        thread.posts = [post for post in thread.posts if post.author != site.me]

    def there(self, page: Page, p: Params) -> Policy:
        yield Click(one(page, "button", "Delete my post"))


class OpenThread(ForumTask):
    level = 2
    words = (
        'Open a thread on the board {board} with the title "{title}" and the text "{text}".',
        'Post a new thread in {board}: "{title}", saying "{text}"',
    )

    def draw(self, site: Forum, rng: Random) -> Params:
        title = f"A question about {rng.choice(TOPICS)}"
        return {"board": rng.choice(site.threads).board, "title": title, "text": rng.choice(REMARKS).rstrip("!?.")}

    def do(self, site: Forum, p: Params) -> None:
        site.open(p["board"], p["title"], p["text"])

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", p["board"]))
        page = yield Click(one(page, "link", "New thread"))
        page = yield Type(one(page, "textbox", "Title"), p["title"], enter=False)
        page = yield Type(one(page, "textbox", "Text"), p["text"], enter=False)
        yield Click(one(page, "button", "Post thread"))


class ChangeSignature(ForumTask):
    level = 1
    words = ('Change your signature to "{text}".', 'Your profile should have the signature "{text}".')

    def do(self, site: Forum, p: Params) -> None:
        site.signature = p["text"]

    def solve(self, page: Page, p: Params) -> Policy:
        page = yield Click(one(page, "link", "Profile"))
        page = yield Type(one(page, "textbox", "Signature"), p["text"], enter=False)
        yield Click(one(page, "button", "Save"))


TEMPLATES = (
    Reply(),
    Follow(),
    CountPosts(),
    LastAuthor(),
    ChangeSignature(),
    Like(),
    DeleteMine(),
    OpenThread(),
    LikeAndReply(),
)
