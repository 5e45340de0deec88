"""What transformers makes of a folder, in whatever version the interpreter that runs this has: JSON in, JSON out. For tests/test_export.py.

    python transformers_peer.py < {"folders": [...], "rows": [[ids]], "texts": [...], "chats": [[...]], "free": [[ids]], "new_tokens": 64}
"""
import json
import sys


def read(folder, asked):
    """Version, logits of rows of ids, the tokens of texts, greedy continuations of `free` ids (EOS does not end them) and of chats."""
    import torch
    import transformers

    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager",
                                                                    dtype="auto")
    problems = {k: list(map(str, v)) for k, v in info.items() if v}
    made = {"version": transformers.__version__, "dtype": str(model.dtype), "problems": problems}
    model.eval().float()
    with torch.no_grad():
        made["logits"] = [model(torch.tensor([row])).logits[0].tolist() for row in asked.get("rows", [])]
        made["free"] = [continued(model, ids, asked["new_tokens"], eos_token_id=None) for ids in asked.get("free", [])]
    if not asked.get("chats") and not asked.get("texts"):
        return made
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made["texts"] = [tokenizer(text)["input_ids"] for text in asked.get("texts", [])]
    made["chats"] = [one_chat(model, tokenizer, messages, asked.get("new_tokens")) for messages in asked.get("chats", [])]
    return made


def one_chat(model, tokenizer, messages, new_tokens):
    """Its text and ids with the answer opened, the text of the whole, and the continuation."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # what the template raises has another type in each version
        return {"error": str(e)}
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
    row = {"text": text, "ids": ids, "whole": tokenizer.apply_chat_template(messages, tokenize=False)}
    return row | (continued(model, ids, new_tokens) if new_tokens else {})


def continued(model, ids, new_tokens, **how):
    """The new ids of a greedy continuation, and by how much each was ahead of the next likely one."""
    import torch

    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                             max_new_tokens=new_tokens, output_logits=True, return_dict_in_generate=True, **how)
    top = torch.stack(out.logits)[:, 0].topk(2).values
    return {"new": out.sequences[0, len(ids):].tolist(), "margins": (top[:, 0] - top[:, 1]).tolist()}


if __name__ == "__main__":
    question = json.load(sys.stdin)
    json.dump([read(folder, question) for folder in question["folders"]], sys.stdout)
