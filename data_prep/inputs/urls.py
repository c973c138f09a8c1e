"""URLs without the secrets in them.

What is stored, printed or digested names a source, and opens nothing.

Passwords and signatures come and go while the file behind them stays the same one, so they are no
part of its name. Where it is not certain whether a part is a secret, it goes.
"""

import re
from urllib.parse import quote, unquote

SCHEME = r"[A-Za-z][\w.+-]{0,30}://"
# A password may hold spaces and quotes; the end of a URL within a text, and a port there, look
# alike but for these.
PASSWORD = r"(?!\[)[^\s/?#@:]*:(?!//|\s|\d+(?:[/?#\s'\",.:;)\]}>]|$))(?:(?!://)[^\n@])*@"
# A quote with more of a value behind it is no end.
REST = r"(?:[^\s'\"<>]|['\"<>]+(?=[\w%&=/@+-]))*"
URL = re.compile(rf"{SCHEME}(?:{PASSWORD})?{REST}")  # within a text
CHAIN = re.compile(rf"::(?={SCHEME})")  # fsspec's: zip://member::https://host/file
TRAILING = ".,:;)]}"  # of a sentence around a URL
# As in user:password@, not of host:80/a@b.
USER = re.compile(r"(?!\[)([^/?#@:]*)(:(?!\d+[/?#])[^@]*)?@([^/?#]*@)?")
AUTHORITY = re.compile(r"[^/?#]*")
USER_NAMES = ("sftp", "ssh", "ftp", "ftps", "smb")  # where a user's name tells whose files they are
CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # container@account: it names a place
MOST_LAYERS = 8  # of percent-encoding, or of URLs one in another; what lies deeper goes

NAMED = r"[A-Za-z_][\w.%\[\]-]*=(?!=)"  # name=, not the padding of base64
SEPARATOR = re.compile(rf"(&|[;~](?={NAMED}))")  # of parameters; the last is Akamai's: exp=1~hmac=2
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # of a name as x_y, x-y or XY
SECRET_PARTS = re.compile(
    r"token|secret|key|sig|pass|pwd|auth|cred|hmac|hdn(?:ts|ea|tl)|verify|accesscode"
)
HARMLESS = re.compile(  # what holds such a part by chance
    r"tokeni[sz]\w*|author(?!i)|key(?:word|board|frame|space)|monkey|turkey|hockey|passage"
    r"|passenger|passive|compass|bypass|signal|signific|design|assign|insight|sacred|credit"
    r"|incredible"
)
SECRET_WORDS = {"bearer", "jwt", "pw", "sas", "session", "policy"}
SECRET_NAMES = {"code", "md5"}  # alone: language_code and content_md5 name a source
PRESIGNED = re.compile(r"(x-amz|x-goog|x-ms|x-oss|q)-.*", re.IGNORECASE)  # the last is Tencent's
OF_GOOGLE = "googleaccessid"
SIGNING = re.compile(r"sig|hmac|hdn|md5|policy|verify")
# What a signature covers and changes with it: Azure's, Akamai's, and when it ends.
BESIDE_A_SIGNATURE = {
    "sv", "sr", "st", "se", "sp", "sk", "ss", "srt", "spr", "sip",
    "skoid", "sktid", "skt", "ske", "sks", "skv",
    "acl", "expires", "expire", "exp", "timestamp", "ts",
}  # fmt: skip
FILE_NAME = re.compile(  # S3's name of a file, as in ?key=data/a.jsonl
    r"[\w./-]+\.(jsonl?|parquet|csv|tsv|txt|arrow|npy|bin|md|html?|zip|tar|gz|bz2|xz|zst)",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """A URL, or any text with URLs in it, without passwords, tokens and signatures.

    What names the source stays.
    """
    return _cleaned(text, 0)


def _cleaned(text: str, depth: int) -> str:
    """A text that lies in so many URLs, one in another."""
    if "://" not in text:
        return text
    if depth > MOST_LAYERS:
        return ""

    def of_url(found: re.Match[str]) -> str:
        whole = found.group()
        url = whole.rstrip(TRAILING)
        trailing = whole[len(url) :]
        cleaned = [_without(part, depth) for part in CHAIN.split(url)]
        return "::".join(cleaned) + trailing

    return URL.sub(of_url, text)


def _without(url: str, depth: int) -> str:
    """One URL without what is secret in its user, path, query and fragment."""
    scheme, _, rest = url.partition("://")
    rest = _with_plain_user(rest)
    user = USER.match(rest)
    if user:
        kept_user = _kept_user(scheme.lower(), user)
        rest = kept_user + rest[user.end() :]
    rest, fragment_mark, fragment = rest.partition("#")
    place, query_mark, query = rest.partition("?")
    host, slash, path = place.partition("/")
    path = _without_in_path(path, depth)
    cleaned = f"{scheme}://{host}{slash}{path}"
    for mark, parts in ((query_mark, query), (fragment_mark, fragment)):
        kept = _without_secrets(parts, depth)
        if kept:
            cleaned += mark + kept
    return cleaned


def _with_plain_user(rest: str) -> str:
    """What follows `://`, with a user and password that are encoded as a whole decoded.

    As in u%3Apw%40host.
    """
    authority = AUTHORITY.match(rest)
    written = authority.group() if authority else ""
    plain = _decoded(written)
    if "@" in plain and "@" not in rest:
        return plain + rest[len(written) :]
    return rest


def _kept_user(scheme: str, user: re.Match[str]) -> str:
    """A name stays where it tells whose files they are; a token in a name's place does not."""
    name, password, _ = user.groups()
    is_container = scheme in CONTAINERS and not password
    is_kept = scheme in USER_NAMES or is_container
    return f"{name}@" if is_kept and name else ""


def _without_in_path(path: str, depth: int) -> str:
    """A path: URLs in it, as proxies have them, and ;name=value behind a part of it."""
    if "://" in path:
        return _cleaned(path, depth + 1)
    parts = []
    for part in path.split("/"):
        if "%" in part:
            part = _cleaned_value(part, depth)
        if ";" in part:
            part = _without_secrets(part, depth)
        parts.append(part)
    return "/".join(parts)


def _without_secrets(query: str, depth: int) -> str:
    """The parameters of a query that are no secrets; URLs within them lose theirs."""
    parts = SEPARATOR.split(query)
    written = parts[::2]
    marks = ["", *parts[1::2]]  # before each
    names = [_name_of(part) for part in written]
    is_signed = any(SIGNING.search(_harmful(name)) for name in names)
    kept = ""
    for mark, name, part in zip(marks, names, written, strict=True):
        _, is_set, value = part.partition("=")
        is_beside_signature = is_signed and name.lower() in BESIDE_A_SIGNATURE
        if is_set and (is_beside_signature or _is_secret(name, value)):
            continue
        if kept:
            kept += mark
        kept += part.removesuffix(value)
        kept += _cleaned_value(value, depth)
    return kept


def _name_of(parameter: str) -> str:
    """The name in name=value, or all where there is no value."""
    name, _, _ = parameter.partition("=")
    return _decoded(name)


def _is_secret(name: str, value: str) -> bool:
    """Whether a parameter of this name is one, judged by what the name contains."""
    lower = name.lower()
    if lower == "key" and FILE_NAME.fullmatch(_decoded(value)):
        return False
    if PRESIGNED.fullmatch(name):
        return True
    if lower == OF_GOOGLE or lower in SECRET_NAMES | SECRET_WORDS:
        return True
    words = {word.lower() for word in WORDS.findall(name)}
    if not words.isdisjoint(SECRET_WORDS):
        return True
    return SECRET_PARTS.search(_harmful(name)) is not None


def _harmful(name: str) -> str:
    """A parameter's name in small letters, without marks and without harmless words.

    These only look like those of secrets.
    """
    letters = re.sub(r"[\W_]", "", name.lower())
    return HARMLESS.sub("", letters)


def _cleaned_value(value: str, depth: int) -> str:
    """A value; where it holds a URL or a query with secrets, without them and encoded once."""
    plain = _decoded(value)
    if "://" in plain:
        cleaned = _cleaned(plain, depth + 1)
    elif depth > MOST_LAYERS:
        return ""
    elif "=" in plain:
        place, mark, query = plain.rpartition("?")
        kept = _without_secrets(query, depth + 1)
        cleaned = place + (mark + kept if kept else "")
    else:
        return value
    if cleaned == plain:
        return value
    return cleaned if plain == value else quote(cleaned, safe="")


def _decoded(text: str) -> str:
    """Without percent-encoding, however often it was applied."""
    for _ in range(MOST_LAYERS):
        plain = unquote(text)
        if plain == text:
            break
        text = plain
    return text
