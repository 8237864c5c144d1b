#!/usr/bin/env bash
# transformers 5.23.0 with tokenizers: `return_assistant_tokens_mask`, where the tokenizer drops white space.
#
# Expected: the mask is 1 at the tokens inside `{% generation %}` blocks, whatever white space stands at a block's ends.
# Seen, with a word-level tokenizer whose pre-tokenizer splits at white space and drops it:
#   the block ends with a line break: the mask is 1 from the first answer to the end of the conversation, the user's words included;
#   the block begins with a blank: the mask is 0 everywhere, in all turns.
# The block's first and last character are looked up as tokens, and a character without a token is taken for truncation. No error, no
# warning; a trainer that uses the mask as the loss's trains the user's words, or nothing.
# Fails if a mask holds the assistant's words alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = "<pad> <u> <a> <e> one two sure yes".split()
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
chat = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "sure"},
    {"role": "assistant", "content": "yes"},
]
turn = "{% for m in messages %}{% if m.role == 'assistant' %}<a>ANSWER{% else %}<u> {{ m.content }} <e>\n{% endif %}{% endfor %}"
forms = {
    "inside the white space": " {% generation %}{{ m.content }} <e>{% endgeneration %} \n",
    "line break at the end": " {% generation %}{{ m.content }} <e>\n{% endgeneration %}",
    "blank at the beginning": "{% generation %} {{ m.content }} <e>{% endgeneration %} \n",
}
seen = {}
for name, answer in forms.items():
    tokenizer.chat_template = turn.replace("ANSWER", answer)
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    shown = [words[i] for i in out["input_ids"]]
    seen[name] = [word for word, mask in zip(shown, out["assistant_masks"]) if mask]
    print(f"{name}: {' '.join(shown)} -> {' '.join(seen[name]) or 'nothing'}")

right = ["two", "<e>", "yes", "<e>"]
assert seen["inside the white space"] == right, "the mask of a block without white space at its ends has changed"
assert seen["line break at the end"] == ["two", "<e>", "<u>", "sure", "<e>", "<a>", "yes", "<e>"], "the behaviour has changed"
assert seen["blank at the beginning"] == [], "the behaviour has changed"
print("as stated")
PY
