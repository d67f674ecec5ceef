"""The methods as people see them, on every page and in every table: their titles and colours."""

TITLES = {
    "base": "base, untrained",
    "full": "full fine-tune",
    "lora": "LoRA",
    "qlora": "QLoRA",
}  # In a table's head and beside a bar, where the method's name says enough.
SHORT_TITLES = {**TITLES, "full": "full"}
# Names of the colours in templates/style.css.
STYLES = {"base": "fourth", "full": "second", "lora": "first", "qlora": "third"}
