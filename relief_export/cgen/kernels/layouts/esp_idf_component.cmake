idf_component_register(SRCS "{{ name }}.c" INCLUDE_DIRS ".")
