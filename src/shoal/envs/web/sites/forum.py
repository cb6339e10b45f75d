"""A forum: boards, threads, posts; you are one of its members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as default
from random import Random
from typing import Any

from shoal.envs.web.sites.site import Form, Refused, Site, area, field, form, heading, lines, link, pick, slug, text
from shoal.envs.web.sites.words import TOPICS, people

BOARDS = ("Cooking", "Cycling", "Gardening")
OPENINGS = ("Where to find {}?", "Help with {}", "My first {}", "The best {} so far", "Is {} worth it?")
REMARKS = (
    "I tried it twice.",
    "Thanks, that helped.",
    "Not in my experience.",
    "Could you say more?",
    "It depends on the weather.",
    "Same here!",
)
THREADS_PER_BOARD = 4


@dataclass
class Post:
    author: str
    text: str
    likes: int = 0
    liked: bool = False
    """By you."""


@dataclass
class Thread:
    board: str
    title: str
    posts: list[Post] = default(default_factory=list)
    followed: bool = False


class Forum(Site):
    host = "forum.test"
    title = "Village Forum"
    menu = {"/": "Boards", "/followed": "Followed", "/profile": "Profile"}

    def fill(self, rng: Random, content: Random) -> None:
        self.me, *others = people(content, 7)
        self.signature = "Cheers"
        self.threads: list[Thread] = []
        topics = content.sample(TOPICS, len(BOARDS) * THREADS_PER_BOARD)
        for number, topic in enumerate(topics):
            thread = Thread(BOARDS[number % len(BOARDS)], content.choice(OPENINGS).format(topic))
            # Nobody posts twice in a thread, so that an author names a post.
            for author in content.sample(others, content.randint(2, 4)):
                thread.posts.append(Post(author, content.choice(REMARKS), content.randint(0, 9)))
            if number % 3 == 0:
                thread.posts.insert(content.randint(1, len(thread.posts)), Post(self.me, content.choice(REMARKS)))
            self.threads.append(thread)

    def state(self) -> Any:
        return self.threads, self.signature

    def thread(self, title: str) -> Thread:
        return next(one for one in self.threads if one.title == title)

    def reply(self, thread: Thread, words: str) -> None:
        if not words:
            raise Refused("A reply needs some text.")
        thread.posts.append(Post(self.me, words))

    def open(self, board: str, title: str, words: str) -> None:
        if board not in BOARDS or not title or not words:
            raise Refused("A thread needs a title and some text.")
        self.threads.append(Thread(board, title, [Post(self.me, words)]))

    def like(self, post: Post) -> None:
        if post.liked or post.author == self.me:
            raise Refused("You cannot like this post.")
        post.liked, post.likes = True, post.likes + 1

    def show(self, path: Sequence[str], query: Form) -> tuple[str, str] | None:
        match path:
            case []:
                return self.title, lines(link(f"/board/{slug(name)}", name) for name in BOARDS)
            case ["board", name]:
                board = next((one for one in BOARDS if slug(one) == name), None)
                if board is None:
                    return None
                return board, link(f"/new/{name}", "New thread") + self._listed(lambda one: one.board == board)
            case ["new", name]:
                fields = (field("Title", "title"), area("Text", "text"))
                return "New thread", form(f"/new/{name}", *fields, button="Post thread")
            case ["thread", number]:
                thread = pick(self.threads, number)
                return None if thread is None else (thread.title, self._posts(thread, number))
            case ["followed"]:
                return "Followed", self._listed(lambda one: one.followed) or text("You follow no thread.")
            case ["profile"]:
                about = text(f"You are {self.me}.")
                return "Profile", about + form("/profile", field("Signature", "text", self.signature), button="Save")
        return None

    def _listed(self, wanted: Any) -> str:
        numbered = [(number, one) for number, one in enumerate(self.threads) if wanted(one)]
        return lines(link(f"/thread/{number}", one.title) for number, one in numbered)

    def _posts(self, thread: Thread, number: str) -> str:
        rows = []
        for place, post in enumerate(thread.posts):
            at = f"/thread/{number}/{place}"
            rows.append(text(f"{post.author}: {post.text} ({post.likes} likes)"))
            if post.author == self.me:
                rows.append(form(f"{at}/delete", button="Delete my post"))
            elif not post.liked:
                rows.append(form(f"{at}/like", button=f"Like {post.author.partition(' ')[0]}"))
        follow = "Unfollow" if thread.followed else "Follow"
        return (
            lines(rows)
            + form(f"/thread/{number}/follow", button=follow)
            + heading("Reply")
            + form(f"/thread/{number}/reply", area("Text", "text"), button="Send")
        )

    def submit(self, path: Sequence[str], form: Form) -> str | None:
        words = form.get("text", "")
        match path:
            case ["new", name]:
                self.open(next((one for one in BOARDS if slug(one) == name), ""), form.get("title", ""), words)
                return f"/thread/{len(self.threads) - 1}"
            case ["profile"]:
                self.signature = words
                return "/profile"
            case ["thread", number, *rest]:
                thread = pick(self.threads, number)
                if thread is None or not self._act(thread, rest, words):
                    return None
                return f"/thread/{number}"
        return None

    def _act(self, thread: Thread, act: Sequence[str], words: str) -> bool:
        match act:
            case ["follow"]:
                thread.followed = not thread.followed
            case ["reply"]:
                self.reply(thread, words)
            case [place, "like" | "delete" as what]:
                post = pick(thread.posts, place)
                if post is None or (what == "delete" and post.author != self.me):
                    return False
                if what == "like":
                    self.like(post)
                else:
                    thread.posts.remove(post)
            case _:
                return False
        return True
