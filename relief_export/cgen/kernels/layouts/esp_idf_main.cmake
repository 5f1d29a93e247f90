idf_component_register(SRCS "main.c" REQUIRES {{ name }} esp_timer)
