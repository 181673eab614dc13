"""Names, places and goods that the tasks fill their sentences with."""


def comma_list(text: str) -> tuple[str, ...]:
    """Split "a, b, c": long lists read better as prose than as one string a line."""
    return tuple(text.split(", "))


FIRST_NAMES = comma_list(
    "Amara, Anton, Beatriz, Bo, Carla, Chen, Dalia, Dmitri, Elena, Emeka, Farah, Felix, Gita, "
    "Goran, Hana, Hugo, Ines, Ivan, Jana, Jonas, Kaito, Katja, Lena, Luis, Maria, Mateo, Nadia, "
    "Niels, Olga, Omar, Paula, Pedro, Quentin, Rania, Rosa, Samuel, Sofia, Tariq, Tessa, Umar, "
    "Valeria, Viktor, Wanda, Xavier, Yara, Yusuf, Zoe"
)
LAST_NAMES = comma_list(
    "Abe, Almeida, Bauer, Bianchi, Castro, Cohen, Dubois, Diaz, Eriksen, Fischer, Fontana, "
    "Garcia, Haddad, Hansen, Ito, Ivanova, Jansen, Kaya, Kovacs, Larsen, Lindqvist, Meyer, "
    "Moreau, Nakamura, Novak, Okafor, Oliveira, Petrov, Popescu, Quinn, Rossi, Santos, Schmidt, "
    "Tanaka, Torres, Ueda, Varga, Weber, Yilmaz, Zhang, Ziegler"
)
CITIES = comma_list(
    "Athens, Berlin, Bergen, Bilbao, Bologna, Brno, Cork, Dublin, Florence, Geneva, Ghent, Graz, "
    "Helsinki, Istanbul, Izmir, Kyoto, Leeds, Lima, Lisbon, London, Lyon, Madrid, Malmo, Milan, "
    "Nairobi, Nantes, Naples, Osaka, Oslo, Paris, Porto, Prague, Quito, Riga, Rome, Rotterdam, "
    "Seville, Tallinn, Turin, Utrecht, Vienna, Warsaw, York, Zagreb, Zurich"
)
