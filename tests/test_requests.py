"""Requests are checked before any work: the message names the request, the field, its value and what is allowed."""
from __future__ import annotations

import dataclasses
import functools

import pytest

from isara_jax.common import UserError
from isara_jax.decode.requests import Request, check, check_sampling

GOOD = Request((1, 2, 3), 7, 20, 0.7, 0.95)


def checked(*requests, context=32):
    check(requests, vocab_size=97, context=context, decode=str)


@pytest.mark.parametrize("change, message", [
    ({"tokens": ()}, "the prompt is empty"),
    ({"tokens": (1, 97, 2)}, "token id 97 is not in the vocabulary, whose ids go from 0 to 96"),
    ({"tokens": (1, -1)}, "token id -1 "),
    ({"tokens": (1,) * 32}, "a prompt of 32 tokens leaves no room in a context of 32"),
    ({"tokens": (1,) * 33, "max_new_tokens": 0}, "a prompt of 33 tokens leaves no room in a context of 32"),
    ({"stop_ids": (3, 97)}, "stop id 97 is not in the vocabulary"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1 is out of range: 0 or more"),
    ({"min_new_tokens": 21}, "min_new_tokens=21 is out of range: from 0 to max_new_tokens=20"),
    ({"min_new_tokens": -1}, "min_new_tokens=-1 "),
    ({"temperature": -0.1}, "temperature=-0.1 is out of range: 0 \\(greedy\\) or a positive number"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"top_p": 0.0}, "top_p=0.0 is out of range: above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p=1.01"),
    ({"top_p": float("nan")}, "top_p=nan"),
    ({"top_k": -1}, "top_k=-1 is out of range: 0 \\(all\\) or a number of tokens"),
    ({"top_k": 2**31}, "top_k=2147483648"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range: above 0; 1 is none"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
    ({"stop": ("###", "")}, "stop=\\['###', ''\\] is out of range: strings that are not empty"),
    ({"seed": -1}, "seed=-1 is out of range: 0 to 2\\*\\*63 - 1"),
    ({"seed": 2**63}, "seed=9223372036854775808"),
], ids=str)
def test_a_bad_request_is_named(change, message):
    with pytest.raises(UserError, match=f"^request 2: {message}"):
        checked(GOOD, GOOD, dataclasses.replace(GOOD, **change), dataclasses.replace(GOOD, top_p=9.0))


def test_what_is_allowed():
    """The ends of every range; a prompt that fills the context where nothing is to be drawn."""
    checked()
    change = functools.partial(dataclasses.replace, GOOD)
    checked(GOOD, change(tokens=(0, 96) * 16, max_new_tokens=0), change(tokens=(0,) * 31, min_new_tokens=20))
    checked(change(temperature=0, top_p=1, top_k=2**31 - 1, repetition_penalty=0.5, stop=("a", " "), stop_ids=(0, 96), seed=0),
            change(max_new_tokens=0, min_new_tokens=0, seed=2**63 - 1))


def test_stop_strings_need_a_decoder():
    """A mistake of the program, not of a person."""
    with pytest.raises(ValueError, match=r"request 1 has stop strings \('x',\) but no decode"):
        check([GOOD, dataclasses.replace(GOOD, stop=("x",))], vocab_size=97, context=32, decode=None)


def test_parameters_alone_are_checked_under_another_name():
    values = {f.name: getattr(GOOD, f.name) for f in dataclasses.fields(Request)
              if f.name in ("max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")}
    check_sampling("--sampling", **values)
    with pytest.raises(UserError, match="^--sampling: top_k=-3 "):
        check_sampling("--sampling", **values | {"top_k": -3})
