"""The mathematics, written once in array API calls; no array library is named or imported here."""
