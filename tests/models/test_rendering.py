import json
import shutil
from datetime import date

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from selfplay.config.policy import PolicyConfig
from selfplay.errors import InputError
from selfplay.models.rendering import Renderer, Template, _plain_backend, load_tokenizer, run_render

TEXTS = ["Hello there!", "How are you,\n today?", "naïve <s> déjà-vu 东京 🙂", "  spaces  ", "x" * 300, "<|user|>"]
CONVERSATIONS = [
    *([{"role": "user", "content": text}] for text in TEXTS),
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]
PLAIN = Template(today=date(2026, 11, 28))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def with_bos():
    """A tokenizer that puts a beginning and an end around every text unless it is told not to, and cuts and pads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def one_by_one(tokenizer):
    return [
        tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=True, return_dict=False)
        for m in CONVERSATIONS
    ]


def test_a_batch_has_the_ids_of_its_conversations(with_bos, mini_world):
    for tokenizer in (with_bos, load_tokenizer(mini_world / "policy", False)):
        expected = one_by_one(tokenizer)
        render = Renderer(tokenizer, PLAIN)
        assert render._encode is not None
        found = render(CONVERSATIONS)
        assert [ids.tolist() for ids in found] == expected and all(ids.dtype == np.int32 for ids in found)
        assert len(set(map(len, expected))) > 3 and render([]) == []


def test_special_tokens_that_are_to_be_split_are_split(with_bos):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=with_bos.backend_tokenizer, bos_token="<s>", eos_token="</s>", split_special_tokens=True
    )
    tokenizer.chat_template = TEMPLATE
    assert [ids.tolist() for ids in Renderer(tokenizer, PLAIN)(CONVERSATIONS)] == one_by_one(tokenizer)


def test_a_tokenizer_with_its_own_way_is_asked_itself(with_bos):
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(
                [t.upper() for t in text] if isinstance(text, list) else text.upper(), *args, **kwargs
            )

    tokenizer = Own(tokenizer_object=with_bos.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    assert _plain_backend(tokenizer) is None
    found = [ids.tolist() for ids in Renderer(tokenizer, PLAIN)(CONVERSATIONS)]
    assert found == one_by_one(tokenizer) != one_by_one(with_bos)


def test_one_that_the_template_refuses_spoils_no_other(with_bos):
    expected = one_by_one(with_bos)
    odd = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    half = [{"role": "user", "content": "half \ud800"}]
    found = Renderer(with_bos, PLAIN)([CONVERSATIONS[0], odd, CONVERSATIONS[1], half])
    assert (found[0].tolist(), found[2].tolist()) == (expected[0], expected[1])
    assert found[1] == "cannot be rendered (TemplateError: no system role)"
    assert found[3].startswith("cannot be rendered (")


def test_the_order_of_a_child(mini_world):
    order = {"policy": str(mini_world / "policy"), "trust_remote_code": False, "conversations": CONVERSATIONS}
    order["template"] = {"kwargs": {}, "today": "2026-11-28"}
    found = run_render(order)
    assert json.loads(json.dumps(found)) == one_by_one(load_tokenizer(mini_world / "policy", False))


def test_a_tokenizer_that_cannot_be_used(mini_world, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path, False)
    shutil.copytree(mini_world / "policy", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "plain" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    with pytest.raises(InputError, match="has no chat template"):
        load_tokenizer(tmp_path / "plain", False)


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}Today: {{ date_string }}."
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def test_the_date_of_a_template_is_that_of_the_run(with_bos):
    """The ids are the same on every day, and those of the library on that day."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=with_bos.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = DATED
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    policy = PolicyConfig(model="x")
    of_the_run = Template.read(policy.template("2024-02-29T23:59:59.000+00:00"))
    odd = [*CONVERSATIONS[:2], [{"role": "user"}]]  # one without content has each rendered alone
    (first, *_), together = Renderer(tokenizer, of_the_run)(odd), Renderer(tokenizer, of_the_run)(CONVERSATIONS)
    assert tokenizer.decode(together[0]) == " Today: 29 Feb 2024.<|user|> Hello there!<|assistant|>"
    assert first.tolist() == together[0].tolist()
    given = PolicyConfig(model="x", template_date="2020-01-02", chat_template_kwargs={"enable_thinking": False})
    ids = Renderer(tokenizer, Template.read(given.template("2024-02-29")))(CONVERSATIONS)
    assert tokenizer.decode(ids[0]) == " Today: 02 Jan 2020.<|user|> Hello there!<|assistant|> <think></think>"
    assert of_the_run.prints_date(tokenizer) and not of_the_run.prints_date(with_bos)
    pinned = Template(kwargs={"date_string": "26 Jul 2024", "enable_thinkin": True}, today=of_the_run.today)
    assert not pinned.prints_date(tokenizer) and pinned.unread(tokenizer) == ["enable_thinkin"]
