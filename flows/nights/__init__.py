"""How one night goes: from its record over its cases to what follows when the engines are gone."""
