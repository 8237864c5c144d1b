"""How a byte-level tokenizer cuts text before it merges bytes, by the name in a GGUF file's `tokenizer.ggml.pre`.

The table follows llama.cpp (src/llama-vocab.cpp). Where llama.cpp replaces a pattern of the model's tokenizer.json by
an approximation, this table has the pattern that it states as the original.

Absent on purpose are names whose tokens are not spelled in bytes (gemma4, granite-embed-multi-311m, sarvam-moe,
whitespace), and afmoe and kimi-k2, which llama.cpp defines by a program instead of a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Patterns, each of which cuts the parts that the one before it left; a match and a gap are one part each.

    With `ignore_merges`, a part that is itself a token becomes that token without merging. `adds_bos` is the default
    for a file that does not state it.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


def _ranges(codepoints: str) -> str:
    """The inside of a character class, from hexadecimal code points and ranges."""
    return "".join("-".join(rf"\x{{{point}}}" for point in part.split("-")) for part in codepoints.split())


_CLITIC = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CLITIC}{_WORD}|\p{{N}}{{1,3}}{_SYMBOLS}{_SPACE}"
_QWEN2 = rf"{_CLITIC}{_WORD}|\p{{N}}{_SYMBOLS}{_SPACE}"

_START = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACE}"
_CASED = rf"{_START}{_UPPER}*{_LOWER}+{_CLITIC}?|{_START}{_UPPER}+{_LOWER}*{_CLITIC}?"
_GPT4O = rf"{_CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACE}"

_CJK = f"[{_ranges('4E00-9FA5 3040-309F 30A0-30FF')}]+"
_CJK_DEEPSEEK = f"[{_ranges('4E00-9FA5 800-4E00 AC00-D7FF')}]+"
# The cased letters that DeepSeek's tokenizer lists; later versions of Unicode have more.
_CASED_DEEPSEEK = _ranges(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_MARKS_DEEPSEEK = _ranges("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_ASCII_MARKS = _ranges("21-2F 3A-40 5B-60 7B-7E")
_DEEPSEEK_V3 = (
    rf"[{_ASCII_MARKS}][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*{_SPACE}"
)
_SPARK = _DEEPSEEK_V3.replace(r"[\r\n]*" + _SPACE, r"|[\r\n]|\s+(?!\S)|\s+")
_BLOOM = rf" ?[^(\s|.,!?{_ranges('2026 3002 FF0C 3001 964 6D4 60C')})]+"
_SCRIPTS_YOUTU = (
    f"[{_ranges('AC00-D7A3 3131-318E')}]+"
    f"|[{_ranges('FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F')}]+"
    f"|[{_ranges('3105-312F')}]+|{_CJK}"
)
_SPACES_JAIS = "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
_PHRASE_EXAONE = rf"{_START}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"

# Names -> how they cut, one row for each rule.
_TABLE: dict[str, Split] = {
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
    "roberta-bpe mpt olmo jais trillion granite-docling exaone4": Split(patterns=(_GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": Split(patterns=(r"\p{N}", _GPT2)),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Split(
        patterns=(_LLAMA3,), ignore_merges=True, adds_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Split(patterns=(_LLAMA3,)),
    "glm4 glm5": Split(patterns=(_LLAMA3,), ignore_merges=True),
    "jais-2": Split(patterns=(rf"{_CLITIC}{_WORD}|\p{{N}}{{1,3}}{_SYMBOLS}|\s*[\r\n]+{_SPACES_JAIS}",)),
    "minicpm5": Split(patterns=(r"\p{N}{1,3}", rf"{_CLITIC}{_WORD}|\p{{N}}+{_SYMBOLS}{_SPACE}"), ignore_merges=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Split(patterns=(_QWEN2,)),
    "qwen35": Split(
        patterns=(
            rf"{_CLITIC}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACE}",
        )
    ),
    "ufakzeka": Split(patterns=(rf"{_WORD[1:]}|\p{{N}}{_SYMBOLS}{_SPACE}",)),
    "laguna": Split(patterns=(r"[^\n]+|[\n]+", _QWEN2)),
    "seed-coder": Split(patterns=(rf"{_CLITIC}{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACE}",)),
    "bailingmoe bailingmoe2 llada-moe": Split(
        patterns=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "exaone-moe": Split(
        patterns=(rf"{_CLITIC}|{_PHRASE_EXAONE}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)
    ),
    "deepseek-llm": Split(
        patterns=(
            r"[\r\n]",
            rf"\s?[{_CASED_DEEPSEEK}]+",
            rf"\s?[{_MARKS_DEEPSEEK}]+",
            r"\s+$",
            _CJK_DEEPSEEK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Split(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_DEEPSEEK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Split(patterns=(r"\p{N}{1,3}", _CJK, _DEEPSEEK_V3)),
    "spark2_5": Split(patterns=(r"\p{N}{1,3}", _CJK, _SPARK, r"\p{N}")),
    "youtu": Split(patterns=(_SCRIPTS_YOUTU, _GPT4O.replace("{1,3}", "")), ignore_merges=True),
    "falcon": Split(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "poro-chat bloom gpt3-finnish": Split(patterns=(_BLOOM,)),
    "viking": Split(patterns=(_BLOOM, r"\p{N}")),
    "tekken": Split(patterns=(_TEKKEN,), ignore_merges=True, adds_bos=True),
    "chameleon": Split(
        patterns=(
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        adds_bos=True,
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Split(patterns=(_GPT4O,)),
    "granite-embed-multi-97m": Split(patterns=(_GPT4O,), ignore_merges=True),
    "tiny_aya cohere2moe": Split(patterns=(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "superbpe": Split(patterns=(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "default": Split(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}

SPLITS: dict[str, Split] = {name: split for names, split in _TABLE.items() for name in names.split()}
