"""The model in Hugging Face's form, and in llama.cpp's: names, tokenizer, marker, card."""
