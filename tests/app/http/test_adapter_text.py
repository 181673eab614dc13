"""What folders that are loaded over HTTP say of text: their template, their ends, their tokens."""

import shutil

import pytest

from slora_core.text.template_sandbox import MAX_SOURCE_CHARS
from slora_core.text.tokenizer import Tokenizer
from tests.app.api_errors import error_of
from tests.app.http.adapter_world import World
from tests.tiny_tokenizer import VOCAB_SIZE, make_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("text"))
    assert world.load("good").status_code == 200
    return world


SHOUT = "{% for m in messages %}{{ m['content'] | upper }}!{% endfor %}"


class TestText:
    """What folders say of text."""

    @staticmethod
    def prompt_of(world, name):
        """The prompt of a chat on an adapter, as text, special tokens shown."""

        async def work(client):
            body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            [request] = world.engine.requests
            return Tokenizer(world.model)._backend.decode(
                request.prompt_ids, skip_special_tokens=False
            )

        return world.run(work)

    @pytest.mark.parametrize(
        "files",
        [
            {"chat_template.jinja": SHOUT},
            {"tokenizer_config.json": {"chat_template": SHOUT}},
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "no"},
                        {"name": "default", "template": SHOUT},
                    ]
                }
            },
        ],
    )
    def test_its_own_template(self, world, files):
        assert world.load("shouting", world.add_text("shouting", files)).status_code == 200
        assert self.prompt_of(world, "shouting") == "HI!"
        assert "assistant" in self.prompt_of(world, "good")

    def test_one_content_with_two_templates(self, world):
        for name, template in (("first", "1"), ("second", "2")):
            folder = world.add_text(name, {"chat_template.jinja": template})
            assert world.load(name, folder).status_code == 200
        assert (self.prompt_of(world, "first"), self.prompt_of(world, "second")) == ("1", "2")

    @pytest.mark.parametrize(
        ("template", "told"),
        [
            ("{% for m in messages %}", "in chat_template.jinja is not valid Jinja in line 1"),
            ("{{ messages | nosuch }}", "in chat_template.jinja is not valid Jinja in line 1"),
            ("x" * (MAX_SOURCE_CHARS + 1), "has 65537 characters; at most 65536"),
        ],
    )
    def test_a_broken_template_is_refused_at_the_load(self, world, template, told):
        folder = world.add_text("broken", {"chat_template.jinja": template})
        assert told in error_of(world.load("broken", folder), 400)["message"]

    def test_a_template_with_marks_for_training_is_served(self, world):
        template = "{%- generation -%}{{ messages[0].content }}{%- endgeneration -%}"
        folder = world.add_text("marked", {"chat_template.jinja": template})
        assert world.load("marked", folder).status_code == 200
        assert self.prompt_of(world, "marked") == "hi"

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            r"{{ '\ud800' }}",
            r"{{ raise_exception('\ud800' * 99999) }}",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        ],
    )
    def test_a_template_that_reaches_or_runs_too_far_is_refused_when_it_runs(self, world, template):
        folder = world.add_text("sly", {"chat_template.jinja": template})
        assert world.load("sly", folder).status_code == 200

        async def work(client):
            body = {"model": "sly", "messages": [{"role": "user", "content": "hi"}]}
            return await client.post("/v1/chat/completions", json=body)

        assert "chat template refuses" in error_of(world.run(work), 400)["message"]

    @pytest.mark.parametrize(
        ("files", "ends"),
        [
            ({"generation_config.json": {"eos_token_id": [2, 40]}}, [2, 40]),
            ({"generation_config.json": {"eos_token_id": None}}, [2]),
            # The base's token 1 is "<s>".
            ({"tokenizer_config.json": {"eos_token": "<s>"}}, [1, 2]),
            ({"tokenizer_config.json": {"eos_token": "<nowhere>"}}, [2]),
            ({"generation_config.json": {"eos_token_id": VOCAB_SIZE}}, [2]),
            (
                {
                    "tokenizer_config.json": {
                        "eos_token": "<other>",
                        "added_tokens_decoder": {"1": {"content": "<other>"}},
                    },
                    "generation_config.json": {"eos_token_id": 1},
                },
                [2],
            ),
        ],
    )
    def test_its_own_ends_where_the_tokens_agree(self, world, files, ends):
        folder = world.add_text("ending", files)
        assert world.load("ending", folder).status_code == 200
        shutil.rmtree(folder)

        async def work(client):
            card = (await client.get("/v1/models/ending")).json()
            body = {"model": "ending", "prompt": "hi", "stop_token_ids": [9]}
            await client.post("/v1/completions", json=body)
            await client.post("/v1/completions", json={**body, "ignore_eos": True})
            return card["eos_token_ids"]

        assert world.run(work) == ends
        stops = [request.sampling.stop_token_ids for request in world.engine.requests]
        assert stops == [(9, *[i for i in ends if i != 2]), (9,)]

    @pytest.mark.parametrize(
        ("files", "told"),
        [
            (
                {"tokenizer_config.json": {"added_tokens_decoder": {"3": {"content": "<tool>"}}}},
                "3 is '<tool>' and not '",
            ),
            ({"added_tokens.json": {"<tool>": VOCAB_SIZE}}, f"{VOCAB_SIZE} is '<tool>'"),
            (
                {"tokenizer.json": {"model": {"vocab": {"<pad>": 0, "<tool>": 3}}}},
                "3 is '<tool>' and not '",
            ),
        ],
    )
    def test_other_tokens_than_the_base_models_are_named(self, world, caplog, files, told):
        folder = world.add_text("tool", files)
        [warning] = world.load("tool", folder).json()["warnings"]
        shutil.rmtree(folder)
        assert warning.startswith("its tokenizer has other tokens than the base model's")
        assert told in warning and warning in caplog.text

    def test_a_copy_of_the_base_models_tokenizer_says_nothing(self, world):
        folder = world.add("copying")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (world.model / name).exists():
                shutil.copy(world.model / name, folder)
        assert world.load("copying", folder).json()["warnings"] == []


def test_a_base_without_a_template_says_which_argument_helps(tmp_path):
    world = World(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (world.model / name).unlink(missing_ok=True)
    make_tokenizer(world.model, chat_template=None)
    assert (
        world.load("own", world.add_text("own", {"chat_template.jinja": SHOUT})).status_code == 200
    )

    async def work(client):
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
        return await client.post("/v1/chat/completions", json=body)

    assert "its argument chat_template" in error_of(world.run(work), 400)["message"]
    assert TestText.prompt_of(world, "own") == "HI!"
