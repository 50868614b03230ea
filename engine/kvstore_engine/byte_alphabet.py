"""The printable characters that byte-level BPE vocabularies write bytes in, from GPT-2 on."""


def _byte_characters() -> dict[int, str]:
    """Printable Latin-1 bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(0x100 + i) for i, byte in enumerate(others)})
    return characters


CHARACTER_OF_BYTE = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


def token_bytes(token: str) -> bytes:
    """The bytes that a vocabulary entry stands for; other characters count as their UTF-8."""
    data = bytearray()
    for character in token:
        byte = BYTE_OF_CHARACTER.get(character)
        data += character.encode() if byte is None else bytes([byte])
    return bytes(data)
