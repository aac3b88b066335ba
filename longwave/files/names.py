"""Names of files that this package gives a meaning in every folder."""

MANIFEST = "manifest.json"  # the list of a folder's files, with their checksums
CARD = "README.md"  # for people, who change it (the hub does, too); no manifest lists it
