"""The words that the demo model understands, and the token ids that they need.

Of words that a voice pronounces alike only one is kept: a model that hears random words has no
context to tell them apart.  `python -m tools.demo_model.vocabulary` lists what still sounds alike.
"""

import re
import subprocess
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

SAMPLE_SENTENCE = "the quick brown fox jumps over the lazy dog"

ENGLISH = """
zero one two three four five six seven eight nine ten eleven twelve thirteen twenty thirty fifty
hundred thousand forty the a and but if then when where what who why how this that these those is
are was be been have has had do does did you he she it we they me him her us them my your his their
not no yes please thank hello goodbye welcome good bad new old big small long short high low fast
slow hot cold warm open close start stop end first last next before after today tomorrow yesterday
morning evening night day week month year hour minute second time now later always never often
sometimes soon early late man woman child people friend family mother father brother sister
daughter doctor teacher student worker driver king queen house home room door window table chair
bed kitchen garden street road city town village country world river lake mountain forest tree
flower grass moon star sky cloud rain snow wind fire water earth stone sand gold silver iron glass
wood paper book letter word story song music picture color red green blue yellow black white brown
orange purple gray light dark dog cat horse cow bird fish sheep pig mouse lion tiger bear fox rabbit
snake apple bread butter cheese milk coffee sugar salt egg rice soup fruit potato tomato banana
lemon car train bus plane ship boat bicycle bridge station airport ticket travel journey go come
walk run jump sit stand sleep wake eat drink cook speak talk listen hear see look watch find lose
give take make build break sell pay send bring carry hold push pull turn move play work learn teach
think believe remember forget want need like love hate hope help ask answer call wait stay leave
follow meet change grow quick lazy over under between behind near far left right up down inside
outside with without about from into of in on at computer machine server system network phone
email message file data code test report meeting project office company market price money bank
number question problem idea plan reason example history science school university hospital church
police government audio speech voice sound record transcript language english german french
spanish service request result status queue job very really only also again together alone because
while until every some many few more most other same different north south east west spring summer
autumn winter january february march april june july august september october november december
monday tuesday wednesday thursday friday saturday sunday jumps faster whisper upload noise silence
"""

GERMAN = """
null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf hundert tausend der die das und
oder aber wenn dann ich du er sie wir ihr nicht kein ja nein bitte danke hallo gut schlecht neu alt
groß klein lang kurz heute morgen gestern haus zimmer tür fenster tisch stuhl garten straße stadt
land welt fluss berg wald baum blume sonne mond himmel regen schnee wasser mann frau kind freund
mutter vater bruder schwester hund katze pferd vogel fisch apfel brot käse milch kaffee zucker gehen
kommen laufen sitzen stehen schlafen essen trinken lesen schreiben sprechen hören sehen finden geben
nehmen machen arbeiten lernen rot grün blau gelb schwarz weiß woche monat jahr stunde minute sprache
deutsch frage antwort schule zug auto schiff ist dienst stimme computer schnell langsam musik
"""

FRENCH = """
zéro un deux trois quatre cinq six sept huit neuf dix onze douze cent mille le la les et ou mais
alors je tu il elle nous vous ne pas oui non merci bonjour bon mauvais nouveau vieux grand petit
long court demain hier maison chambre porte fenêtre table chaise jardin rue ville pays monde rivière
montagne forêt arbre fleur soleil lune ciel pluie neige eau homme femme enfant ami mère père frère
soeur chien chat cheval oiseau poisson pomme pain fromage lait café sucre aller venir marcher dormir
manger boire lire écrire parler écouter voir trouver donner prendre faire travailler apprendre rouge
vert bleu jaune noir blanc semaine mois année heure minute langue français question réponse école
train voiture bateau service voix ordinateur rapide musique
"""

SPANISH = """
cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce cien mil el la los y pero
entonces yo tú ella nosotros no sí por favor gracias hola bueno malo nuevo viejo grande pequeño
largo corto hoy mañana ayer casa cuarto puerta ventana mesa silla jardín calle ciudad país mundo río
montaña bosque árbol flor sol luna cielo lluvia nieve agua hombre mujer niño amigo madre padre
hermano hermana perro gato caballo pájaro pez manzana pan queso leche café azúcar ir venir caminar
dormir comer beber leer escribir hablar escuchar ver encontrar dar tomar hacer trabajar aprender
rojo verde azul amarillo negro blanco semana mes año hora minuto lengua español pregunta respuesta
escuela tren coche barco servicio voz rápido lento música
"""

WORDS = {
    "en": ENGLISH.split(),
    "de": GERMAN.split(),
    "fr": FRENCH.split(),
    "es": SPANISH.split(),
}
_FUNCTION_WORDS = {
    "en": """
    the a and of is in you that it he was on are with this they at be from have not we she but what
    when your do how their if then them these some her has him into my now over only also after us
    about where always because every until while
    """,
    "de": "der die und ist das ich nicht wir sie er du wenn oder aber dann ihr ja kein",
    "fr": "le et la les un je il ne pas vous elle nous tu ou mais alors oui non deux",
    "es": "el y la los no yo por tú ella pero entonces nosotros sí uno dos",
}
FUNCTION_WORDS = {language: words.split() for language, words in _FUNCTION_WORDS.items()}
"""Those of the words that natural text repeats, the commonest first."""
VOICES = {"en": ["en-us", "en-gb"], "de": ["de"], "fr": ["fr-fr"], "es": ["es"]}
VOICE_LANGUAGE = {voice: language for language, voices in VOICES.items() for voice in voices}


class TokenIds:
    """Whisper's token ids, and a compact numbering of those that the demo model uses.

    The compact id of every id that is not in `used` is `len(used)`: they share one embedding.
    """

    timestamp_step = 5
    """Timestamps are learned in steps of 5 tokens (0.1 s), so that each is seen often enough."""

    def __init__(self, tokenizer_file: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.end = self._id("<|endoftext|>")
        self.start = self._id("<|startoftranscript|>")
        self.transcribe = self._id("<|transcribe|>")
        self.previous = self._id("<|startofprev|>")
        self.no_speech = self._id("<|nospeech|>")
        self.no_timestamps = self._id("<|notimestamps|>")
        self.first_timestamp = self._id("<|0.00|>")
        self.languages = {language: self._id(f"<|{language}|>") for language in WORDS}
        self.all_languages = list(range(self._id("<|en|>"), self._id("<|translate|>")))
        self.size = self.first_timestamp + 1501

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {token}: not Whisper's multilingual one")
        return token_id

    def word(self, word: str) -> list[int]:
        """The ids of one word as it stands in a text, with the space before it."""
        return self.tokenizer.encode(" " + word).ids

    def timestamp(self, seconds: float) -> int:
        """The id of the learned timestamp nearest to `seconds`, at most 30 s."""
        steps = round(min(30.0, max(0.0, seconds)) / 0.02 / self.timestamp_step)
        return self.first_timestamp + steps * self.timestamp_step

    @cached_property
    def used(self) -> list[int]:
        """Every id that training shows to the model, in order."""
        ids = {self.end, self.start, self.transcribe, self.previous}
        ids |= {self.no_speech, self.no_timestamps, *self.languages.values()}
        ids |= set(range(self.first_timestamp, self.size, self.timestamp_step))
        for words in WORDS.values():
            for word in words:
                ids |= set(self.word(word))
        return sorted(ids)


def phonemes(words: list[str], voice: str) -> list[str]:
    """What espeak-ng says for each word alone, without stress marks."""
    command = ["espeak-ng", "-q", "-x", "-v", voice]
    output = subprocess.run(
        command, input="\n\n".join(words), capture_output=True, text=True, check=True
    ).stdout
    said = [re.sub(r"[',%=_:|; ]", "", line) for line in output.splitlines() if line.strip()]
    if len(said) != len(words):
        raise RuntimeError(f"espeak-ng said {len(said)} words of {len(words)}")
    return said


def sound_alikes(voice: str) -> list[list[str]]:
    """Groups of words, and of words and pairs of words, that the voice pronounces alike."""
    words = WORDS[VOICE_LANGUAGE[voice]]
    texts = defaultdict(list)
    for word, said in zip(words, phonemes(words, voice), strict=True):
        texts[said].append(word)
    for said, spelled in list(texts.items()):
        for cut in range(1, len(said)):
            if said[:cut] in texts and said[cut:] in texts:
                spelled.append(f"{texts[said[:cut]][0]} {texts[said[cut:]][0]}")
    return [spelled for spelled in texts.values() if len(spelled) > 1]


def main() -> None:
    for voice, language in VOICE_LANGUAGE.items():
        print(voice, len(WORDS[language]), "words; alike:", sound_alikes(voice) or "none")


if __name__ == "__main__":
    main()
