"""URLs without the secrets in them: what is stored, printed or digested names a source, and opens nothing.

Passwords and signatures come and go while the file behind them stays the same one, so they are no part of its name.
"""

import re
from urllib.parse import unquote

URL = re.compile(r"[A-Za-z][\w.+-]*://[^\s'\"<>]*")  # within a text
CHAIN = re.compile(r"::(?=[A-Za-z][\w.+-]*://)")  # fsspec's: zip://member::https://host/file
TRAILING = ".,:;)]}"  # of a sentence around a URL
USER = re.compile(r"(?!\[)([^/?#@:]*)(:(?!\d+[/?#])[^@]*)?@([^/?#]*@)?")  # user:password@, not of host:80/a@b
USER_NAMES = ("sftp", "ssh", "ftp", "ftps", "smb")  # where a user's name tells whose files they are
CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # container@account: it names a place
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # of a name as x_y, x-y or XY
SECRET_WORDS = {
    "token", "accesstoken", "authtoken", "secret", "clientsecret", "password", "passwd", "passphrase", "pass", "pwd",
    "pw", "credential", "credentials", "auth", "authorization", "bearer", "jwt", "key", "apikey", "accesskey",
    "authkey", "sas", "sig", "sign", "signature", "hmac", "session", "policy",
}  # fmt: skip
PRESIGNED = re.compile(r"(x-amz|x-goog|x-ms|x-oss|q)-.*|googleaccessid", re.IGNORECASE)  # the last q- is Tencent's
SIGNING_WORDS = {"sig", "sign", "signature", "hmac", "policy"}
BESIDE_A_SIGNATURE = {  # what it covers and changes with it: Azure's, and when it ends
    "sv", "sr", "st", "se", "sp", "sk", "ss", "srt", "spr", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv",
    "expires", "expire", "exp", "timestamp", "ts",
}  # fmt: skip


def without_credentials(text: str) -> str:
    """A URL, or any text with URLs in it, without passwords, tokens and signatures; what names the source stays."""
    return URL.sub(_cleaned, text) if "://" in text else text


def _cleaned(found: re.Match[str]) -> str:
    whole = found.group()
    url = whole.rstrip(TRAILING)
    return "::".join(_without(part) for part in CHAIN.split(url)) + whole[len(url) :]


def _without(url: str) -> str:
    """One URL: its user and password, and the parts of its query and fragment that are secrets."""
    scheme, _, rest = url.partition("://")
    if user := USER.match(rest):
        rest = _kept_user(scheme.lower(), user) + rest[user.end() :]
    rest, fragment_mark, fragment = rest.partition("#")
    place, query_mark, query = rest.partition("?")
    for mark, parts in ((query_mark, query), (fragment_mark, fragment)):
        if kept := _without_secrets(parts):
            place += mark + kept
    return f"{scheme}://{place}"


def _kept_user(scheme: str, user: re.Match[str]) -> str:
    """A name stays where it tells whose files they are; a token in a name's place does not."""
    name = user.group(1)
    is_kept = scheme in USER_NAMES or (scheme in CONTAINERS and not user.group(2))
    return f"{name}@" if is_kept and name else ""


def _without_secrets(query: str) -> str:
    """The parts of a query that are no secrets, as they were."""
    parts = query.split("&")
    names = [unquote(part.partition("=")[0]) for part in parts]
    words = [{word.lower() for word in WORDS.findall(name)} for name in names]
    is_signed = any(some & SIGNING_WORDS for some in words)

    def is_kept(name: str, of_name: set[str]) -> bool:
        if of_name & SECRET_WORDS or PRESIGNED.fullmatch(name):
            return False
        return not (is_signed and name.lower() in BESIDE_A_SIGNATURE)

    return "&".join(part for part, name, some in zip(parts, names, words, strict=True) if is_kept(name, some))
